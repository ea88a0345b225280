from .api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
