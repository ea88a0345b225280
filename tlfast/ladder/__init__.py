"""Ladder side-tuning: a small side network that climbs the taps of a frozen backbone; only it is trained."""

from .bank import LadderBank
from .blocks import SideBlock
from .config import LadderConfig
from .model import LadderModel
from .rung import Rung

__all__ = ["LadderBank", "LadderConfig", "LadderModel", "Rung", "SideBlock"]
