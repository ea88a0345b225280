"""What a step of a side network needs beside its inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch

NORMS = ("layer", "rms")
PLACEMENTS = ("post", "pre", "sandwich")
# The activations of a feed-forward, in the order of tl_activation in csrc/tlfast.h.
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


class StepWeights(NamedTuple):
    """The weights of a rung and a side block, in the order of tl_step_weight in csrc/tlfast.h; None where absent.

    R side width, D width of the tap; matrices are (outputs, inputs). qkv: queries of all heads, then keys, then values.
    """

    rung_weight: torch.Tensor
    rung_bias: torch.Tensor | None
    alpha: torch.Tensor
    attention_norm_weight: torch.Tensor
    attention_norm_bias: torch.Tensor | None
    qkv_weight: torch.Tensor
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output_weight: torch.Tensor
    output_bias: torch.Tensor | None
    attention_output_norm: torch.Tensor | None
    feed_forward_norm_weight: torch.Tensor
    feed_forward_norm_bias: torch.Tensor | None
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    gate_weight: torch.Tensor | None
    gate_bias: torch.Tensor | None
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None
    feed_forward_output_norm: torch.Tensor | None


class StepSettings(NamedTuple):
    """The shape of a side block. placement: "post", "pre" or "sandwich"; norm: "layer" or "rms"; see `ACTIVATIONS`."""

    heads: int
    kv_heads: int
    head_dim: int
    placement: str
    norm: str
    activation: str
    eps: float
    scale: float
    temperature: float
