"""What a tower has before its head: a frozen model, a ladder on one, or a model that is trained.

A body is called with transformers' inputs and gives (B, width) float32. static: whether nothing in it learns, so that
its features are worth keeping. What is frozen is under an attribute `frozen...` and never saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..backbone import FrozenBackbone, fingerprint
from ..ladder import LadderConfig, LadderModel
from .readouts import Pooled, Readout

# what the pooled hidden states do not depend on, by model type, beside poolers
_UNREAD = {
    "clip_vision_model": "post_layernorm.",
    "siglip_vision_model": "head.",
    "siglip_text_model": "head.",
    "dinov2": "embeddings.mask_token",
}


class Body(nn.Module):
    """width: of the features. pads: as of `Readout`. precision: of frozen weights."""

    static = True
    pads = False
    width: int
    precision = "fp32"

    @property
    def config(self) -> Any:
        """The transformers configuration of its model; None where there is none."""
        return None

    def fingerprint(self) -> str | None:
        """What identifies its frozen weights; None where there are none."""
        return None


class FrozenBody(Body):
    """A backbone frozen by `tlfast.freeze`, read as `readout` says."""

    def __init__(self, backbone: FrozenBackbone, readout: Readout) -> None:
        super().__init__()
        self.width, self.pads = readout.width, readout.pads
        self.frozen, self.precision = backbone.with_taps(()), backbone.precision
        self.frozen_readout = readout.requires_grad_(False)
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.frozen.config

    @torch.no_grad()
    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        inputs = _as_read(self, inputs)
        return self.frozen_readout(self.frozen.base, self.frozen(**inputs).last_hidden_state, inputs)

    def fingerprint(self) -> str:
        """Of the backbone and of what reads it."""
        return _with_readout(self.frozen, self.frozen_readout)


class LadderBody(Body):
    """What `FrozenBody` gives, and what a ladder on the same frozen forward adds to it: nothing at the start."""

    static = False

    def __init__(self, backbone: FrozenBackbone, readout: Readout, config: LadderConfig | None, task: str) -> None:
        super().__init__()
        self.width, self.pads = readout.width, readout.pads
        config = replace(config or LadderConfig(), pooling=readout.pooling)
        self.precision = backbone.precision
        self.ladder = LadderModel(backbone, task, num_labels=readout.width, config=config)
        classifier: Any = self.ladder.head.classifier
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        self.frozen_readout = readout.requires_grad_(False)
        self._ready = False
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    @property
    def config(self) -> Any:
        """The backbone's."""
        return self.ladder.config

    def calibrate(self, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Set the side network's starting weights from these batches; without it the first batch seen serves."""
        self.ladder.calibrate(_as_read(self, batch) for batch in batches)
        self._ready = True

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        inputs = _as_read(self, inputs)
        if not self._ready and not self.ladder.calibrated:
            self.ladder.calibrate([inputs])
        self._ready = True
        output = self.ladder.backbone(**inputs)
        with torch.no_grad():
            frozen = self.frozen_readout(self.ladder.backbone.base, output.last_hidden_state, inputs)
        return frozen + self.ladder.climb(output, inputs.get("attention_mask")).float()

    def fingerprint(self) -> str:
        """Of the backbone and of what reads it."""
        return _with_readout(self.ladder.backbone, self.frozen_readout)


class TrainedBody(Body):
    """A transformers model that is trained as a whole."""

    static = False

    def __init__(self, model: Any, readout: Readout) -> None:
        super().__init__()
        self.width, self.pads = readout.width, readout.pads
        self.model = model.requires_grad_(True)
        self.readout = readout.requires_grad_(True)
        if isinstance(readout, Pooled):
            for name, parameter in self.model.named_parameters():
                if _unread(getattr(model.config, "model_type", ""), name):
                    parameter.requires_grad_(False)  # DistributedDataParallel waits for every gradient
        _save_tied_once(self)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        inputs = _as_read(self, inputs)
        return self.readout(self.model, self.model(**inputs).last_hidden_state, inputs).float()


class TrainedModule(Body):
    """Any module that gives (B, width), or an output with pooler_output, trained as a whole."""

    static = False

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self.width = width
        self.module = module.requires_grad_(True)
        _save_tied_once(self)

    @property
    def config(self) -> Any:
        """The module's, where it has one."""
        return getattr(self.module, "config", None)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return _vector(self.module, inputs, self.width)


class FrozenModule(Body):
    """The same, frozen and always in eval mode."""

    def __init__(self, module: nn.Module, width: int) -> None:
        super().__init__()
        self.width = width
        self.frozen = module.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    @property
    def config(self) -> Any:
        """The module's, where it has one."""
        return getattr(self.frozen, "config", None)

    def train(self, mode: bool = True) -> FrozenModule:
        """Only what is not frozen changes its mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    @torch.no_grad()
    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return _vector(self.frozen, inputs, self.width)

    def fingerprint(self) -> str:
        """Of its weights and its class."""
        return fingerprint(self.frozen, type(self.frozen).__name__)


def _vector(module: nn.Module, inputs: Mapping[str, torch.Tensor], width: int) -> torch.Tensor:
    """A module's output as (B, width); an image module that is not transformers' takes its pixels by position."""
    is_transformers = hasattr(module, "config")
    output = module(**inputs) if is_transformers or "pixel_values" not in inputs else module(inputs["pixel_values"])
    pooled = getattr(output, "pooler_output", None)
    vectors = output if pooled is None else pooled.flatten(1)
    if not isinstance(vectors, torch.Tensor) or vectors.ndim != 2 or vectors.shape[1] != width:
        given = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
        raise ValueError(f"{type(module).__name__}: gave {given}; it must give (B, {width}), a vector for each example")
    return vectors.float()


def _unread(model_type: str, name: str) -> bool:
    """Whether pooled hidden states do not depend on a parameter."""
    return name.startswith("pooler.") or _UNREAD.get(model_type, "pooler.") in name


def _as_read(body: Body, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tower that was trained on padded texts saw no mask."""
    return {name: value for name, value in inputs.items() if not (body.pads and name == "attention_mask")}


def _with_readout(backbone: FrozenBackbone, readout: Readout) -> str:
    return fingerprint(readout, (type(readout).__name__, backbone.fingerprint()))


def _save_tied_once(body: Body) -> None:
    """Safetensors, which checkpoints are, refuses names that share their memory, such as those of T5's embedding."""
    body.register_state_dict_post_hook(_drop_tied)
    body.register_load_state_dict_post_hook(_expect_no_tied)


def _tied(body: nn.Module) -> set[str]:
    """All names of a parameter but its first."""
    return {name for name, _ in body.named_parameters(remove_duplicate=False)} - {
        name for name, _ in body.named_parameters()
    }


def _drop_tied(body: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in _tied(body):
        del state[prefix + name]


def _expect_no_tied(body: nn.Module, incompatible: Any) -> None:
    tied = tuple(_tied(body))
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(tied)]


def _drop_frozen(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}frozen")]:
        del state[key]


def _expect_no_frozen(_module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not any(part.startswith("frozen") for part in key.split("."))
    ]
