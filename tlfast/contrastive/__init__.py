"""Contrastive image-text losses that never hold the B x B matrix of scores, and dual encoders trained with them.

`training` trains a DualEncoder on images with classes and captions, `probing` fits linear probes on frozen features;
both are imported by their own names, since they need the extra [train] and scikit-learn.
"""

from .dual import DualEncoder
from .encoders import TextEncoder, embed_images, image_features
from .losses import clip_loss, siglip_loss, unicl_loss
from .modules import UniCLLoss
from .towers import Tower, TowerConfig

__all__ = [
    "DualEncoder",
    "TextEncoder",
    "Tower",
    "TowerConfig",
    "UniCLLoss",
    "clip_loss",
    "embed_images",
    "image_features",
    "siglip_loss",
    "unicl_loss",
]
