"""From a tower's last hidden states to one vector an example: by pooling, or as CLIP and SigLIP read theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..backbone import FrozenBackbone
from ..backbone.parts import find_submodule
from ..ladder.config import POOLINGS
from ..ladder.heads import default_pooling, pool

Inputs = Mapping[str, torch.Tensor]

_POST_NORM = "post_layernorm|vision_model.post_layernorm"


class Readout(nn.Module):
    """forward(model, last, inputs): the tower's model, its last hidden states (B, S, D), its inputs -> (B, width).

    pooling: what a ladder beside it pools. two_towers: whether image and text features are already comparable.
    pads: whether texts are padded to their greatest length and read without a mask.
    """

    two_towers = False
    pads = False

    def __init__(self, width: int, pooling: str, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.width, self.pooling = width, pooling
        self.projection = nn.Identity() if projection is None else projection


class Pooled(Readout):
    """The "mean" over tokens, the first ("cls") or the "last" one."""

    def forward(self, model: nn.Module, last: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        mask = last.new_ones(last.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        return pool(last.float(), mask, self.pooling)


class ClipImage(Readout):
    """CLIP: the class token, normalised and projected."""

    two_towers = True

    def forward(self, model: nn.Module, last: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.projection(find_submodule(model, _POST_NORM)[1](last[:, 0].float()))


class ClipText(Readout):
    """CLIP: the end token, projected. end: its id; the highest id of a text where the configuration has an old one."""

    two_towers = True

    def __init__(self, width: int, end: int, projection: nn.Module) -> None:
        super().__init__(width, "last", projection)
        self.end = end

    def forward(self, model: nn.Module, last: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        ids = inputs["input_ids"]
        at = ids.argmax(dim=1) if self.end == 2 else (ids == self.end).int().argmax(dim=1)
        return self.projection(last[torch.arange(len(last), device=last.device), at.to(last.device)].float())


class SiglipImage(Readout):
    """SigLIP: its own attention pooling."""

    two_towers = True

    def forward(self, model: nn.Module, last: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return find_submodule(model, "head|vision_model.head")[1](last.float())


class SiglipText(Readout):
    """SigLIP: the last position, projected; texts are padded as it was trained."""

    two_towers = True
    pads = True

    def forward(self, model: nn.Module, last: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return find_submodule(model, "head|text_model.head")[1](last[:, -1].float())


def image_readout(model: Any) -> tuple[nn.Module, Readout] | None:
    """The image tower of an image-text model and how it reads it; None for any other model."""
    if _kind(model) == "clip":
        return model.vision_model, ClipImage(model.config.projection_dim, "cls", model.visual_projection)
    if _kind(model) == "siglip":
        if not getattr(model.config.vision_config, "vision_use_head", True):
            raise ValueError("image: this SigLIP model has no pooling head; pass image=model.vision_model with a head")
        return model.vision_model, SiglipImage(model.config.vision_config.hidden_size, "mean")
    return None


def text_readout(model: Any) -> tuple[nn.Module, Readout] | None:
    """The text tower of an image-text model and how it reads it; None for any other model."""
    if _kind(model) == "clip":
        config = model.config.text_config
        return model.text_model, ClipText(model.config.projection_dim, config.eos_token_id, model.text_projection)
    if _kind(model) == "siglip":
        config = model.config.text_config
        width = getattr(config, "projection_size", None) or config.hidden_size
        return model.text_model, SiglipText(width, "mean")
    return None


def pooled(backbone: FrozenBackbone, pooling: str | None) -> Pooled:
    """Pooling as asked, or by default. Raises ValueError for a pooling that is not there."""
    chosen = default_pooling(backbone) if pooling is None else pooling
    if chosen not in POOLINGS:
        raise ValueError(f"pooling: {chosen!r} is not available; allowed: {', '.join(map(repr, POOLINGS))}")
    return Pooled(backbone.output_width, chosen)


def _kind(model: Any) -> str | None:
    """The model type of an image-text model with two towers."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) if hasattr(config, "text_config") else None
