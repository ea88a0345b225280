"""Transfer what a large frozen model knows to a new task without back-propagating through it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import ops

if TYPE_CHECKING:
    from . import nn
    from .backbone import FrozenBackbone, freeze
    from .ladder import LadderBank, LadderConfig, LadderModel

__version__ = "0.1.0"
__all__ = ["FrozenBackbone", "LadderBank", "LadderConfig", "LadderModel", "__version__", "freeze", "nn", "ops"]

_HOME = {"freeze": ".backbone", "FrozenBackbone": ".backbone"}
_HOME |= {"LadderBank": ".ladder", "LadderConfig": ".ladder", "LadderModel": ".ladder"}
_ROOMS = {"backbone", "contrastive", "data", "features", "graph", "knowledge", "ktn", "ladder", "nn", "offsite"}
_ROOMS |= {"planning", "training"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'tlfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
