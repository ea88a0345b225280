"""What a side block computes with beside its input."""

from __future__ import annotations

from typing import NamedTuple

import torch

NORMS = ("layer", "rms")
PLACEMENTS = ("post", "pre")
PRECISIONS = ("fp32", "bf16")
# The activations of a feed-forward, in the order of tl_activation in csrc/tlfast.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


class BlockWeights(NamedTuple):
    """The weights of a side block, in the order of tl_block_weight in csrc/tlfast.h; None where absent.

    R width, I = heads head_dim, F feed-forward; matrices are (outputs, inputs). qkv (3 I, R): queries of all heads,
    then keys, then values.
    """

    attention_norm_weight: torch.Tensor
    attention_norm_bias: torch.Tensor | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    output_weight: torch.Tensor
    output_bias: torch.Tensor | None
    feed_forward_norm_weight: torch.Tensor
    feed_forward_norm_bias: torch.Tensor | None
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None


class BlockSettings(NamedTuple):
    """The shape of a side block. placement: "post" or "pre"; norm: "layer" or "rms"; see `ACTIVATIONS`; precision: of
    the operands of its products, "fp32" or "bf16"."""

    heads: int
    placement: str
    norm: str
    activation: str
    causal: bool
    eps: float
    scale: float
    attention_dropout: float
    hidden_dropout: float
    precision: str = "fp32"
