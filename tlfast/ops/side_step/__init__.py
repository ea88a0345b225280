from .api import IMPLEMENTATIONS, side_step
from .weights import ACTIVATIONS, StepSettings, StepWeights

__all__ = ["ACTIVATIONS", "IMPLEMENTATIONS", "StepSettings", "StepWeights", "side_step"]
