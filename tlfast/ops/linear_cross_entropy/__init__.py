from .api import IMPLEMENTATIONS, linear_cross_entropy

__all__ = ["IMPLEMENTATIONS", "linear_cross_entropy"]
