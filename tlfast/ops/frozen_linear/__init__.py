from .api import ACTIVATIONS, IMPLEMENTATIONS, frozen_linear
from .weight import PRECISIONS, FrozenWeight

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "PRECISIONS", "FrozenWeight", "frozen_linear"]
