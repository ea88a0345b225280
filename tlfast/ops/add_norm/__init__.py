from .api import IMPLEMENTATIONS, add_norm, prenorm

__all__ = ["IMPLEMENTATIONS", "add_norm", "prenorm"]
