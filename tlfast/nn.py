"""The modules of every room, to drop into any PyTorch model."""

from .backbone.linear import FrozenLinear
from .contrastive import UniCLLoss
from .graph import HeteroConv
from .ladder import Rung, SideBlock

__all__ = ["FrozenLinear", "HeteroConv", "Rung", "SideBlock", "UniCLLoss"]
