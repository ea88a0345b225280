from .api import IMPLEMENTATIONS, hmpnn_layer
from .plan import LayerPlan

__all__ = ["IMPLEMENTATIONS", "LayerPlan", "hmpnn_layer"]
