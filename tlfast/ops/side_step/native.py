"""A step of a side network on the CPU: C++ (csrc/ops/cpu/side_step.cpp)."""

from __future__ import annotations

from array import array

import torch

from ... import _native
from .._rows import empty_float32
from .weights import ACTIVATIONS, StepSettings, StepWeights


def side_step(
    tap: torch.Tensor,
    s: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    weights: StepWeights,
    settings: StepSettings,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tap, s, keys, values = tap.contiguous(), s.contiguous(), keys.contiguous(), values.contiguous()
    weights = StepWeights(*(None if w is None else w.contiguous() for w in weights))  # type: ignore[arg-type]
    addresses = array("q", map(_native.pointer, weights))
    mask, bias = (None if x is None else x.contiguous() for x in (key_mask, bias))
    cosines, sines = (None, None) if rotation is None else (part.contiguous() for part in rotation)
    new_keys, new_values = (empty_float32(s.shape[0], settings.kv_heads, settings.head_dim) for _ in range(2))
    out = empty_float32(*s.shape)
    _native.library().side_step_cpu(
        addresses.buffer_info()[0],
        tap.data_ptr(),
        s.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        _native.pointer(mask),
        _native.pointer(bias),
        _native.pointer(cosines),
        _native.pointer(sines),
        new_keys.data_ptr(),
        new_values.data_ptr(),
        out.data_ptr(),
        *tap.shape,
        s.shape[1],
        settings.heads,
        settings.kv_heads,
        settings.head_dim,
        weights.up_weight.shape[0],
        keys.shape[2],
        weights.alpha.numel(),
        0 if cosines is None or cosines.shape[0] == 1 else settings.head_dim,
        0 if settings.placement == "post" else 1,
        settings.norm == "rms",
        ACTIVATIONS.index(settings.activation),
        settings.eps,
        settings.scale,
        settings.temperature,
        torch.get_num_threads(),
    )
    return out, new_keys, new_values
