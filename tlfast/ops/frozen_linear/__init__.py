from .api import ACTIVATIONS, IMPLEMENTATIONS, automatic, frozen_linear
from .reference import ACTIVATE
from .weight import PRECISIONS, FrozenWeight, stored_layout

__all__ = [
    "ACTIVATE",
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "PRECISIONS",
    "FrozenWeight",
    "automatic",
    "frozen_linear",
    "stored_layout",
]
