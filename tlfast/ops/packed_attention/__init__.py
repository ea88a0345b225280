from .api import IMPLEMENTATIONS, packed_attention

__all__ = ["IMPLEMENTATIONS", "packed_attention"]
