"""A tower: a body, and a head that brings its features to the width the two towers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..backbone import FrozenBackbone, freeze
from ..backbone.families import find_family
from ..ladder import LadderConfig
from .bodies import Body, FrozenBody, FrozenModule, LadderBody, TrainedBody, TrainedModule
from .readouts import Readout, image_readout, pooled, text_readout

TRAIN = ("nothing", "head", "ladder", "full")
HEADS = ("linear", "mlp", "none")


@dataclass(frozen=True)
class TowerConfig:
    """What of a tower learns, and how it is read.

    train: "nothing"; "head", on a frozen model; "ladder", a side network on a frozen model and the head; "full".
    head: "linear", "mlp" (two layers, GELU between them) or "none". None: "none" with train="nothing" and for the
        towers of CLIP and SigLIP unless train="head", else "linear".
    pooling: "mean", "cls" or "last" token of a model that does not say itself how it is read; None: by the model.
    ladder: with train="ladder"; None: its defaults. It pools as the tower does. precision: of frozen weights, as for
        `tlfast.freeze`.
    width: of the output of a module that is not transformers', where it has no attribute num_features.
    Raises ValueError for a setting that is not there or means nothing beside the others.
    """

    train: str = "head"
    head: str | None = None
    pooling: str | None = None
    ladder: LadderConfig | None = None
    precision: str = "fp32"
    width: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (("train", self.train, TRAIN), ("head", self.head, (None, *HEADS))):
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is not available; allowed: {', '.join(map(repr, allowed))}")
        if self.ladder is not None and self.train != "ladder":
            raise ValueError(f"ladder: means nothing with train={self.train!r}; leave it out, or pass train='ladder'")
        if self.train == "nothing" and self.head not in (None, "none"):
            raise ValueError(f"head: a {self.head!r} one learns, and train is 'nothing'; pass train='head'")
        if self.train == "head" and self.head == "none":
            raise ValueError("head: 'none' leaves nothing to learn with train='head'; pass train='nothing'")
        if self.train == "full" and self.precision != "fp32":
            raise ValueError(f"precision: {self.precision!r} is of frozen weights; leave it out with train='full'")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TowerConfig:
        """From what `to_dict` gave; TypeError for anything else."""
        ladder = settings.get("ladder")
        return cls(**{**settings, "ladder": None if ladder is None else LadderConfig(**ladder)})


class Tower(nn.Module):
    """A body and a head.

    features(**inputs): (B, width) float32 before the head; of a static tower always the same, so they can be kept.
    project(features): (B, dim). centre: what is taken off the normalised features before the head, where it was set.
    """

    centre: torch.Tensor
    centred: torch.Tensor  # 0-dim bool: whether the centre was set

    def __init__(self, body: Body, head: nn.Module, dim: int) -> None:
        super().__init__()
        self.body, self.head, self.width, self.dim = body, head, body.width, dim
        self.register_buffer("centre", torch.zeros(body.width))
        self.register_buffer("centred", torch.tensor(False))

    @property
    def static(self) -> bool:
        """Whether its features never change in training."""
        return self.body.static

    def features(self, **inputs: torch.Tensor) -> torch.Tensor:
        """transformers' inputs of B examples -> (B, width) float32."""
        device = self.centre.device
        return self.body(**{name: value.to(device) for name, value in inputs.items()})

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """(B, width) -> (B, dim). Raises ValueError for another width."""
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features: {tuple(features.shape)}; must be (B, {self.width}), as features() gives them")
        x = features.to(self.centre.device, torch.float32)
        return self.head(torch.where(self.centred, F.normalize(x, dim=1) - self.centre, x))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """transformers' inputs of B examples -> (B, dim)."""
        return self.project(self.features(**inputs))

    def centre_on(self, features: torch.Tensor) -> None:
        """From now on take the mean direction of these features, (N, width), off all.

        A text encoder that was not made for pairs gives all texts much in common, which tells no class from another.
        Raises ValueError for another width and for features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.width or not len(features) or not features.isfinite().all():
            raise ValueError(f"features: must be (N, {self.width}), N at least 1 and all finite")
        self.centre.copy_(F.normalize(features.float(), dim=1).mean(dim=0))
        self.centred.fill_(True)


@dataclass(frozen=True)
class Plan:
    """What a tower will be, before the width that both share is known."""

    argument: str
    body: Body
    config: TowerConfig
    head: str
    two_towers: bool

    def tower(self, dim: int) -> Tower:
        """Raises ValueError where there is no head and the width is another."""
        width = self.body.width
        if self.head == "none":
            if width != dim:
                raise ValueError(
                    f"{self.argument}: its features have {width} numbers and the shared width is {dim}; give it a head "
                    f"by train='head', or pass dim={width}"
                )
            return Tower(self.body, nn.Identity(), dim)
        if self.head == "mlp":
            return Tower(self.body, nn.Sequential(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim)), dim)
        linear = nn.Linear(width, dim, bias=not self.two_towers)
        if self.two_towers and width == dim:
            nn.init.eye_(linear.weight)  # so that training starts from what the model knows already
        return Tower(self.body, linear, dim)


def plan_image(model: Any, config: TowerConfig) -> Plan:
    """The image tower of a model. Raises ValueError or TypeError for a model that cannot be one."""
    return _plan("image", model, config, image_readout, "image-classification")


def plan_text(model: Any, config: TowerConfig) -> Plan:
    """The text tower of a model. Raises ValueError or TypeError for a model that cannot be one."""
    return _plan("text", model, config, text_readout, "sequence-classification")


def _plan(
    argument: str, model: Any, config: TowerConfig, own: Callable[[Any], tuple[nn.Module, Readout] | None], task: str
) -> Plan:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: got a {type(model).__name__}; pass a model, or a backbone from tlfast.freeze")
    found = own(model)
    if found is not None:
        if config.pooling is not None:
            raise ValueError(f"pooling: {argument}'s model says itself how its tower is read; leave it out")
        body = _body(*found, config, task)
    elif config.train == "ladder" or _is_known(model):  # freeze says why where a ladder cannot be
        body = _pooled_body(argument, model, config, task)
    else:
        body = _module_body(argument, model, config)
    two_towers = found is not None
    without = config.train == "nothing" or (two_towers and config.train != "head")
    return Plan(argument, body, config, config.head or ("none" if without else "linear"), two_towers)


def _is_known(model: nn.Module) -> bool:
    """Whether its hidden states can be pooled."""
    base: Any = getattr(model, "base_model", model)
    return isinstance(model, FrozenBackbone) or find_family(base) is not None


def _pooled_body(argument: str, model: Any, config: TowerConfig, task: str) -> Body:
    """Of a model whose hidden states are pooled."""
    if isinstance(model, FrozenBackbone) and config.train == "full":
        raise ValueError(f"{argument}: is frozen, and train is 'full'; pass the model itself, or another train")
    backbone = model if isinstance(model, FrozenBackbone) else freeze(model, config.precision)
    if backbone.is_encoder_decoder:
        raise ValueError(f"{argument}: is an encoder-decoder; pass its encoder, such as T5EncoderModel")
    readout = pooled(backbone, config.pooling)
    return _body(backbone.base if config.train == "full" else backbone, readout, config, task)


def _body(model: Any, readout: Readout, config: TowerConfig, task: str) -> Body:
    if config.train == "full":
        return TrainedBody(model, readout)
    backbone = model if isinstance(model, FrozenBackbone) else freeze(model, config.precision)
    if config.train == "ladder":
        return LadderBody(backbone, readout, config.ladder, task)
    return FrozenBody(backbone, readout)


def _module_body(argument: str, module: nn.Module, config: TowerConfig) -> Body:
    """Of a module that tlfast does not know inside: it gives vectors itself."""
    if config.pooling is not None:
        raise ValueError(f"pooling: {argument}'s {type(module).__name__} gives vectors itself; leave it out")
    if config.precision != "fp32":
        raise ValueError(f"precision: {argument}'s {type(module).__name__} can only be 'fp32'; leave it out")
    width = config.width or getattr(module, "num_features", None) or _config_width(module)
    if not isinstance(width, int):
        raise ValueError(
            f"{argument}: how wide the output of {type(module).__name__} is is not known; pass TowerConfig(width=...)"
        )
    return TrainedModule(module, width) if config.train == "full" else FrozenModule(module, width)


def _config_width(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else getattr(config, "hidden_size", None)
