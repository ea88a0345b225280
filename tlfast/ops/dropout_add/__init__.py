from .api import IMPLEMENTATIONS, dropout_add

__all__ = ["IMPLEMENTATIONS", "dropout_add"]
