from .api import IMPLEMENTATIONS, add_norm

__all__ = ["IMPLEMENTATIONS", "add_norm"]
