from .api import ACTIVATIONS, IMPLEMENTATIONS, automatic, frozen_linear, why_not_fp8
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
    "why_not_fp8",
]
