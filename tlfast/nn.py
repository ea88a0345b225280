"""The modules of every room, to drop into any PyTorch model."""

from .ladder import Rung, SideBlock

__all__ = ["Rung", "SideBlock"]
