"""Operations: one meaning each, several implementations behind one name."""

from __future__ import annotations

from . import _dispatch
from .add_norm import IMPLEMENTATIONS as _ADD_NORM
from .add_norm import add_norm, prenorm
from .attention import IMPLEMENTATIONS as _ATTENTION
from .attention import attention
from .contrastive import IMPLEMENTATIONS as _CONTRASTIVE
from .contrastive import contrastive_sigmoid, contrastive_softmax
from .dropout import dropout
from .dropout_add import IMPLEMENTATIONS as _DROPOUT_ADD
from .dropout_add import dropout_add
from .feed_forward import IMPLEMENTATIONS as _FEED_FORWARD
from .feed_forward import feed_forward
from .frozen_linear import IMPLEMENTATIONS as _FROZEN_LINEAR
from .frozen_linear import FrozenWeight, frozen_linear
from .hetero_aggregate import IMPLEMENTATIONS as _HETERO_AGGREGATE
from .hetero_aggregate import Relation, RelationGroup, hetero_aggregate
from .hmpnn_layer import IMPLEMENTATIONS as _HMPNN_LAYER
from .hmpnn_layer import LayerPlan, hmpnn_layer
from .linear_cross_entropy import IMPLEMENTATIONS as _LINEAR_CROSS_ENTROPY
from .linear_cross_entropy import linear_cross_entropy
from .norm_tap import IMPLEMENTATIONS as _NORM_TAP
from .norm_tap import norm_tap
from .packed_attention import IMPLEMENTATIONS as _PACKED_ATTENTION
from .packed_attention import packed_attention
from .quantise_rows import IMPLEMENTATIONS as _QUANTISE_ROWS
from .quantise_rows import quantise_rows
from .rung import IMPLEMENTATIONS as _RUNG
from .rung import rung, rung_gradients
from .sample_neighbours import IMPLEMENTATIONS as _SAMPLE_NEIGHBOURS
from .sample_neighbours import Sampled, sample_neighbours
from .side_block import IMPLEMENTATIONS as _SIDE_BLOCK
from .side_block import side_block
from .side_step import IMPLEMENTATIONS as _SIDE_STEP
from .side_step import side_step

__all__ = [
    "FrozenWeight",
    "LayerPlan",
    "Relation",
    "RelationGroup",
    "Sampled",
    "add_norm",
    "attention",
    "contrastive_sigmoid",
    "contrastive_softmax",
    "describe",
    "dropout",
    "dropout_add",
    "feed_forward",
    "frozen_linear",
    "hetero_aggregate",
    "hmpnn_layer",
    "implementations",
    "linear_cross_entropy",
    "norm_tap",
    "packed_attention",
    "prenorm",
    "quantise_rows",
    "rung",
    "rung_gradients",
    "sample_neighbours",
    "side_block",
    "side_step",
]

_IMPLEMENTATIONS = {
    "frozen_linear": _FROZEN_LINEAR,
    "rung": _RUNG,
    "attention": _ATTENTION,
    "add_norm": _ADD_NORM,
    "prenorm": _ADD_NORM,
    "dropout_add": _DROPOUT_ADD,
    "feed_forward": _FEED_FORWARD,
    "side_step": _SIDE_STEP,
    "side_block": _SIDE_BLOCK,
    "norm_tap": _NORM_TAP,
    "quantise_rows": _QUANTISE_ROWS,
    "packed_attention": _PACKED_ATTENTION,
    "contrastive_softmax": _CONTRASTIVE,
    "contrastive_sigmoid": _CONTRASTIVE,
    "hetero_aggregate": _HETERO_AGGREGATE,
    "hmpnn_layer": _HMPNN_LAYER,
    "sample_neighbours": _SAMPLE_NEIGHBOURS,
    "linear_cross_entropy": _LINEAR_CROSS_ENTROPY,
}


def implementations(op: str) -> dict[str, str]:
    """For each implementation of an operation "available", or the reason why it cannot run on this machine.

    Raises:
        ValueError: no operation of that name.
    """
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"op={op!r} is not an operation: use one of {tuple(_IMPLEMENTATIONS)}")
    return _dispatch.availability(_IMPLEMENTATIONS[op])


def describe() -> dict[str, dict]:
    """For each operation: "auto" (what impl="auto" takes here), "why", and its "implementations"."""
    rows = {}
    for op, names in _IMPLEMENTATIONS.items():
        auto, why = _dispatch.automatic(names)
        rows[op] = {"auto": auto, "why": why, "implementations": implementations(op)}
    return rows
