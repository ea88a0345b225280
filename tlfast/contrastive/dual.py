"""DualEncoder: an image tower and a text tower whose embeddings can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint
from .modules import UniCLLoss
from .readouts import image_readout, text_readout
from .towers import Plan, Tower, TowerConfig, plan_image, plan_text

_SCALE = 1 / 0.07  # CLIP's at the start


class DualEncoder(nn.Module):
    """Two towers, each a body and a head, and a learnt logit scale.

    image: a CLIP or SigLIP model, of which both towers are taken as they are where `text` is None; a transformers
        vision model; a FrozenBackbone; or any module that takes pixels (B, 3, H, W) and gives (B, width).
    text: a transformers text model, a FrozenBackbone, or a CLIP or SigLIP model, of which the text tower is taken.
    image_config, text_config: TowerConfig, what of each tower learns: nothing, a head, a ladder, or all. None:
        "nothing" for the towers of one CLIP or SigLIP model, else "head".
    dim: the width both share. None: that of a tower without a head, else the text tower's.
    scale: tau at the start; None: the CLIP or SigLIP model's own (at most max_scale), else 1 / 0.07.
    impl, group: of the loss, as for `unicl_loss`.

    encode_image(pixel_values), encode_text(input_ids, attention_mask, ...): (B, dim) float32, rows of length 1; instead
    of inputs both take features=(B, width), which `dual.image.features(...)` and `dual.text.features(...)` give and
    which never change where `dual.image.static`: compute them once and train the heads on them.
    forward(pixel_values or image_features, input_ids ... or text_features, labels): a transformers ModelOutput with
    loss (UniCL; labels (B,) int64, -1 a label of its own, None where all are distinct), image_embeds and text_embeds.
    `dual.text.centre_on(features)` takes what all texts have in common off a frozen text encoder's features.
    Only what learns requires grad; state_dict() and save_pretrained hold no frozen weights.

    Raises ValueError for towers that do not fit together, TypeError for what is no model.
    Source: Radford et al. 2021 (arXiv 2103.00020); Zhai et al. 2022, "LiT" (arXiv 2111.07991) for a frozen tower;
    Yang et al. 2022 (arXiv 2204.03610) for the loss.
    """

    def __init__(
        self,
        image: nn.Module,
        text: nn.Module | None = None,
        image_config: TowerConfig | None = None,
        text_config: TowerConfig | None = None,
        dim: int | None = None,
        scale: float | None = None,
        max_scale: float = 100.0,
        impl: str = "auto",
        group: Any = None,
    ) -> None:
        super().__init__()
        both = text is None
        if both and (image_readout(image) is None or text_readout(image) is None):
            raise ValueError(f"text: missing, and image's {type(image).__name__} has no text tower; pass a text model")
        text = image if text is None else text
        default = TowerConfig("nothing" if both else "head")
        plans = (plan_image(image, image_config or default), plan_text(text, text_config or default))
        self.dim = _shared_width(plans, dim)
        self.image, self.text = (plan.tower(self.dim) for plan in plans)
        start = _own_scale(image, max_scale) if both and scale is None else scale
        self.loss = UniCLLoss(_SCALE if start is None else start, max_scale, impl, group)
        learns = any(parameter.requires_grad for tower in (self.image, self.text) for parameter in tower.parameters())
        self.loss.requires_grad_(learns)  # alone it says nothing about which pairs belong together
        self.description = checkpoint.describe(image, text, both, plans, self.dim, max_scale)

    @property
    def logit_scale(self) -> torch.Tensor:
        """tau, at most max_scale; dimensionless."""
        return self.loss.log_scale.detach().exp().clamp(max=self.loss.max_scale)

    def encode_image(self, pixel_values: torch.Tensor | None = None, *, features: Any = None) -> torch.Tensor:
        """Pixels (B, 3, H, W), or features (B, width) of them -> (B, dim) float32, rows of length 1."""
        return F.normalize(self.image.project(_features(self.image, "pixel_values", pixel_values, features)), dim=1)

    def encode_text(
        self, input_ids: torch.Tensor | None = None, *, features: Any = None, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Token ids (B, S) and what else the tokenizer gives, or features (B, width) -> (B, dim), rows of length 1."""
        return F.normalize(self.text.project(_features(self.text, "input_ids", input_ids, features, **inputs)), dim=1)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool = True,
        **text_inputs: torch.Tensor,
    ) -> Any:
        """Pair i is image i and text i. labels as the class says. return_loss: as transformers' CLIPModel takes it."""
        from transformers.models.clip.modeling_clip import CLIPOutput

        image = self.encode_image(pixel_values, features=image_features)
        text = self.encode_text(input_ids, features=text_features, **text_inputs)
        loss = self.loss(image, text, labels) if return_loss else None
        return CLIPOutput(loss=loss, image_embeds=image, text_embeds=text)  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write model.safetensors (what learns) and config.json, with the fingerprints of what is frozen; no pickles.

        Raises OSError, and what safetensors raises, for a disk that is full; nothing is left half-written.
        """
        checkpoint.save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, image: nn.Module | str | None = None, text: nn.Module | str | None = None
    ) -> DualEncoder:
        """The dual encoder that was saved, on the models its towers are made of.

        image, text: models, or names or folders of transformers models, as at the start. None: for a transformers model
            that was trained as a whole, its saved configuration; else the name it was loaded by; for text also `image`,
            where both towers are of one model.
        Raises ValueError where a frozen model is not the one of the time, a model is needed and not given, or a file is
        missing or damaged.
        """
        return checkpoint.load(cls, Path(folder), image, text)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In eval mode for the time of a `with` block."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def _shared_width(plans: tuple[Plan, Plan], dim: int | None) -> int:
    if dim is not None:
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim: got {dim!r}; pass an integer of at least 1")
        return dim
    bare = [plan.body.width for plan in plans if plan.head == "none"]
    return bare[0] if bare else plans[1].body.width


def _own_scale(model: Any, max_scale: float) -> float:
    """tau of an image-text model."""
    return min(math.exp(float(model.logit_scale.detach())), max_scale)


def _features(
    tower: Tower, name: str, given: torch.Tensor | None, features: torch.Tensor | None, **others: torch.Tensor
) -> torch.Tensor:
    """A tower's features: those at hand, or of its inputs."""
    if (given is None) == (features is None):
        raise ValueError(f"{name}, features: pass one of the two")
    if features is not None:
        return features
    assert given is not None
    return tower.features(**{name: given}, **others)
