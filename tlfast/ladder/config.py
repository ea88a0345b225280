"""LadderConfig: every setting of a ladder, checked when it is made."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

INITS = ("prune", "pca", "random")
GATES = ("scalar", "channel")
POOLINGS = ("mean", "cls", "last")
SIDE_PRECISIONS = ("fp32", "bf16")
TAP_STORAGES = ("keep", "int8", "project", "offload", "stream")


@dataclass
class LadderConfig:
    """Settings of a ladder (Sung et al. 2022, arXiv 2206.06522, section 3).

    reduction: the side network is d / reduction wide; must leave every head at least one channel.
    layers: "all" or the indices of the backbone blocks that get a rung and a side block; negative from the end.
    gate_temperature: T of mu = sigmoid(alpha / T).
    gate: one alpha a rung ("scalar", as in the paper) or one a side channel ("channel").
    init: "prune" the backbone's blocks structurally, rotate them onto the taps' principal components ("pca"), or
        "random". Of a model the table of families does not know, only the rungs start from the backbone.
    tap_storage: how a tap is kept for the backward pass, which needs it for the gradient of its projection alone.
        "keep": as the backbone gives it. "int8": in 8 bits with a scale a token; of all gradients only those of the
        projections are inexact, by about 1 %. "project": the rungs read P h, tap_dim numbers, with a fixed basis P for
        each tap (the principal components of calibration's taps); its gradients are exact, but what a tap holds beside
        the basis is lost. "offload": in the host's pinned memory, from a GPU. "stream": not at all; the backbone runs a
        second time in the backward pass. With "keep", "offload" and "stream" gradients are the same within rounding.
        In test accuracy, MiniLM, three seeds (benchmarks/bench_tap_storage.py): on SST-2 "keep" 87.8 %, "int8" 87.1,
        "project" to 96 of 384 87.5; on TREC 95.7, 95.9, 96.0; no paired interval excludes a difference of 0.
    tap_dim: the width k to which "project" reduces a tap; the others have no use for it.
    dropout: of the side network; None takes the backbone's own probabilities.
    pooling: what a sequence head reads: the masked "mean", the first ("cls") or the "last" token.
    blend: let the head read the backbone's own last hidden state too: a classifier through a trained gate, a language
        model as a sum.
    side_precision: of the side network's products. "fp32": in float32, but a rung's in its tap's dtype. "bf16": as
        under torch.autocast in bfloat16, whatever the backbone's precision: operands are rounded, weights, gradients
        and the optimizer stay in float32, and taps are kept in bfloat16. With a cache of keys and values, as generate()
        has it, in float32.
    decoder_layers: as layers, for an encoder-decoder's decoder; None: as layers.
    Raises ValueError naming the setting, what was given and what is allowed.
    """

    reduction: int = 8
    layers: str | Sequence[int] = "all"
    gate_temperature: float = 0.1
    init: str = "prune"
    tap_storage: str = "keep"
    tap_dim: int = 96
    gate: str = "scalar"
    dropout: float | None = None
    pooling: str = "mean"
    blend: bool = True
    decoder_layers: str | Sequence[int] | None = None
    side_precision: str = "fp32"

    def __post_init__(self) -> None:
        _one_of("init", self.init, INITS)
        _one_of("gate", self.gate, GATES)
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("tap_storage", self.tap_storage, TAP_STORAGES)
        _one_of("side_precision", self.side_precision, SIDE_PRECISIONS)
        if not isinstance(self.reduction, int) or self.reduction < 1:
            raise ValueError(f"reduction: got {self.reduction!r}; pass an integer of at least 1")
        if not 0 < self.gate_temperature < math.inf:
            raise ValueError(f"gate_temperature: got {self.gate_temperature!r}; pass a finite number above 0")
        if not isinstance(self.tap_dim, int) or self.tap_dim < 1:
            raise ValueError(f"tap_dim: got {self.tap_dim!r}; pass an integer of at least 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}; pass None or a probability in [0, 1)")
        if self.layers != "all":
            self.layers = _indices("layers", self.layers)
        if self.decoder_layers not in (None, "all"):
            self.decoder_layers = _indices("decoder_layers", self.decoder_layers)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return asdict(self)


def _indices(name: str, layers: Any) -> list[int]:
    try:
        return [operator.index(index) for index in layers]
    except TypeError:
        raise ValueError(f'{name}: got {layers!r}; pass "all" or a list of block indices') from None


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not available; allowed: {', '.join(map(repr, allowed))}")
