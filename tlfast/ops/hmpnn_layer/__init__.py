from .api import IMPLEMENTATIONS, hmpnn_layer
from .plan import LayerPlan
from .project import project

__all__ = ["IMPLEMENTATIONS", "LayerPlan", "hmpnn_layer", "project"]
