from .api import IMPLEMENTATIONS, rung

__all__ = ["IMPLEMENTATIONS", "rung"]
