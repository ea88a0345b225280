"""The modules of every room, to drop into any PyTorch model."""

from .contrastive import UniCLLoss
from .ladder import Rung, SideBlock

__all__ = ["Rung", "SideBlock", "UniCLLoss"]
