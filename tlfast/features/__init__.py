"""Vectors for a whole file from a frozen backbone: batches, pooling, and an array that appears whole or not at all."""

from ..ladder.heads import default_pooling
from .array import FeatureFile
from .extract import Extractor, pool_packed
from .inputs import BATCH_TOKENS, ImageSource, TextSource, first_inputs, identify
from .run import write_features

__all__ = [
    "BATCH_TOKENS",
    "Extractor",
    "FeatureFile",
    "ImageSource",
    "TextSource",
    "default_pooling",
    "first_inputs",
    "identify",
    "pool_packed",
    "write_features",
]
