"""Offsite-tuning: two parties tune a model together, and neither sees the other's model or data."""

from .adapter import Adapter, save_adapter
from .block_map import BlockMap, emulator_blocks
from .bundle import Bundle
from .distil import Distillation
from .making import make
from .methods import Method, TaskSpec, tunable
from .plugging import plug
from .recipes import Recipe
from .tasks import TASKS

__all__ = [
    "TASKS",
    "Adapter",
    "BlockMap",
    "Bundle",
    "Distillation",
    "Method",
    "Recipe",
    "TaskSpec",
    "emulator_blocks",
    "make",
    "plug",
    "save_adapter",
    "tunable",
]
