from .api import IMPLEMENTATIONS, side_block
from .weights import ACTIVATIONS, PLACEMENTS, BlockSettings, BlockWeights

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "PLACEMENTS", "BlockSettings", "BlockWeights", "side_block"]
