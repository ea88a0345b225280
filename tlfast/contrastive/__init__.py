"""Contrastive image-text losses that never hold the B x B matrix of scores, and dual encoders trained with them."""

from .dual import DualEncoder
from .losses import clip_loss, siglip_loss, unicl_loss
from .modules import UniCLLoss
from .towers import Tower, TowerConfig

__all__ = ["DualEncoder", "Tower", "TowerConfig", "UniCLLoss", "clip_loss", "siglip_loss", "unicl_loss"]
