"""Offsite-tuning: two parties tune a model together, and neither sees the other's model or data."""

from .block_map import emulator_blocks
from .bundle import Bundle
from .making import make

__all__ = ["Bundle", "emulator_blocks", "make"]
