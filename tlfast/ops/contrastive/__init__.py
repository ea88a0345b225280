from .api import IMPLEMENTATIONS, contrastive_sigmoid, contrastive_softmax

__all__ = ["IMPLEMENTATIONS", "contrastive_sigmoid", "contrastive_softmax"]
