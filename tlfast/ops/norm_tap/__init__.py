from .api import IMPLEMENTATIONS, norm_tap

__all__ = ["IMPLEMENTATIONS", "norm_tap"]
