from .api import IMPLEMENTATIONS, rung
from .delayed import rung_gradients

__all__ = ["IMPLEMENTATIONS", "rung", "rung_gradients"]
