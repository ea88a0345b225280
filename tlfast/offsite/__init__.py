"""Offsite-tuning: two parties tune a model together, and neither sees the other's model or data."""

from .block_map import emulator_blocks

__all__ = ["emulator_blocks"]
