"""A side block on the CPU: C++ (csrc/ops/cpu/matrix/side_block.cpp)."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch

from ... import _native
from .._rows import empty_float32
from .weights import ACTIVATIONS, BlockSettings, BlockWeights


def forward(
    x: torch.Tensor,
    weights: BlockWeights,
    settings: BlockSettings,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, S, R), zeros behind each sequence's last token, and what the backward needs: `kept_width` numbers a row and
    (B, H, S, 2) statistics."""
    x, mask = x.contiguous(), None if key_mask is None else key_mask.contiguous()
    dense = [None if w is None else w.contiguous() for w in weights]
    batch, length, _ = x.shape
    out, kept = empty_float32(*x.shape), empty_float32(batch, length, kept_width(weights, settings))
    statistics = empty_float32(batch, settings.heads, length, 2)
    described, addresses = _described(x, weights, settings, seeds), _addresses(dense)
    _native.library().side_block_forward_cpu(
        described.buffer_info()[0],
        addresses.buffer_info()[0],
        x.data_ptr(),
        _native.pointer(mask),
        out.data_ptr(),
        kept.data_ptr(),
        statistics.data_ptr(),
        torch.get_num_threads(),
    )
    return out, kept, statistics


def backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    kept: torch.Tensor,
    statistics: torch.Tensor,
    weights: BlockWeights,
    settings: BlockSettings,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """dx and the gradient of each weight, None where there is no weight."""
    dout, x, mask = dout.contiguous(), x.contiguous(), None if key_mask is None else key_mask.contiguous()
    dense = [None if w is None else w.contiguous() for w in weights]
    gradients = [None if w is None else empty_float32(*w.shape) for w in weights]
    dx = empty_float32(*x.shape)
    described, addresses, written = _described(x, weights, settings, seeds), _addresses(dense), _addresses(gradients)
    _native.library().side_block_backward_cpu(
        described.buffer_info()[0],
        addresses.buffer_info()[0],
        x.data_ptr(),
        _native.pointer(mask),
        kept.data_ptr(),
        statistics.data_ptr(),
        dout.data_ptr(),
        dx.data_ptr(),
        written.buffer_info()[0],
        torch.get_num_threads(),
    )
    return dx, gradients


def kept_width(weights: BlockWeights, settings: BlockSettings) -> int:
    """Numbers a row that a forward keeps: the heads' output and, where norms stand behind the layers, the last sum."""
    width, inner = weights.output_weight.shape
    return inner + (width if settings.placement == "post" else 0)


def _addresses(tensors: Sequence[torch.Tensor | None]) -> array:
    return array("q", map(_native.pointer, tensors))


def _described(x: torch.Tensor, weights: BlockWeights, settings: BlockSettings, seeds: torch.Tensor | None) -> array:
    """struct tl_side_block of tlfast.h."""
    inner = weights.output_weight.shape[1]
    drawn = (0, 0, 0) if seeds is None else tuple(seed & (2**64 - 1) for seed in seeds.tolist())
    packed = struct.pack(
        "11q4d3Q",
        *x.shape,
        settings.heads,
        inner // settings.heads,
        weights.up_weight.shape[0],
        0 if settings.placement == "post" else 1,
        settings.norm == "rms",
        ACTIVATIONS.index(settings.activation),
        settings.causal,
        settings.precision == "bf16",
        settings.eps,
        settings.scale,
        settings.attention_dropout,
        settings.hidden_dropout,
        *drawn,
    )
    return array("B", packed)
