"""Contrastive image-text losses that never hold the B x B matrix of scores."""

from .losses import clip_loss, siglip_loss, unicl_loss
from .modules import UniCLLoss

__all__ = ["UniCLLoss", "clip_loss", "siglip_loss", "unicl_loss"]
