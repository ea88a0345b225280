"""Knowledge transfer on heterogeneous graphs (KTN): labels on one node type, predictions on another."""

from .classifier import Classifier
from .hmpnn import HMPNN
from .metapaths import Metapath, metapaths
from .metrics import scores
from .transfer import KnowledgeTransfer

__all__ = ["HMPNN", "Classifier", "KnowledgeTransfer", "Metapath", "metapaths", "scores"]
