"""A side network on one new token a sequence: each rung and block is one operation."""

from __future__ import annotations

from typing import Any

import torch

from ..ops.side_step import StepSettings, StepWeights, side_step
from .attention import Rotation
from .blocks import SideBlock
from .cache import Slot
from .fused import operation_name, parameters_of
from .rung import Rung


def step(
    block: Any,
    rung: Any,
    tap: torch.Tensor,
    s: torch.Tensor,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotation: Rotation | None,
    slot: Slot,
) -> torch.Tensor:
    """What block(rung(tap, s)) gives for one position, (B, 1, R); its keys and values go into the slot.

    bias: (1, heads, 1, past + 1). rotation: cosines and sines, (B or 1, 1, 1, head_dim).
    """
    kept = slot.read_heads()
    if kept is None:
        shape = (s.shape[0], block.spec.kv_heads, 0, block.spec.head_dim)
        kept = (s.new_empty(shape), s.new_empty(shape))
    out, keys, values = side_step(
        tap[:, 0],
        s[:, 0],
        *kept,
        _weights(block, rung),
        _settings(block, rung),
        key_mask=key_mask,
        bias=None if bias is None else bias[0, :, 0],
        rotation=None if rotation is None else (rotation[0][:, 0, 0], rotation[1][:, 0, 0]),
    )
    slot.extend_heads(keys[:, :, None], values[:, :, None])
    return out[:, None]


def _settings(block: SideBlock, rung: Rung) -> StepSettings:
    spec = block.spec
    return StepSettings(
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        spec.placement,
        spec.norm,
        operation_name(spec.activation),
        spec.eps,
        spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        rung.temperature,
    )


def _weights(block: SideBlock, rung: Rung) -> StepWeights:
    attention, mlp = block.attention, block.feed_forward
    return StepWeights(
        rung.weight,
        rung.bias,
        rung.alpha,
        *parameters_of(block.attention_norm),
        *parameters_of(attention.qkv),
        parameters_of(attention.query_norm)[0],
        parameters_of(attention.key_norm)[0],
        *parameters_of(attention.output),
        parameters_of(block.attention_output_norm)[0],
        *parameters_of(block.feed_forward_norm),
        *parameters_of(mlp.up),
        *parameters_of(mlp.gate),
        *parameters_of(mlp.down),
        parameters_of(block.feed_forward_output_norm)[0],
    )
