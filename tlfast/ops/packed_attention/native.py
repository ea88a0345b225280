"""Attention of packed sequences on the CPU: C++ (csrc/ops/cpu/matrix/packed_attention.cpp)."""

from __future__ import annotations

import torch

from ... import _native

Rotation = tuple[torch.Tensor, torch.Tensor]


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    starts_k: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
    rotation: Rotation | None,
) -> torch.Tensor:
    q, k, v = _rows(q), _rows(k), _rows(v)
    starts, starts_k = starts.contiguous(), starts_k.contiguous()
    bias = None if bias is None else _rows(bias)
    cosines, sines = (None, None) if rotation is None else (part.contiguous() for part in rotation)
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    _native.library().packed_attention_cpu(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        starts.data_ptr(),
        starts_k.data_ptr(),
        _native.pointer(bias),
        _native.pointer(cosines),
        _native.pointer(sines),
        out.data_ptr(),
        starts.shape[0] - 1,
        q.shape[1],
        *k.shape[1:],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *((0, 0) if bias is None else bias.stride()[:2]),
        -1 if window is None else window,
        _native.dtype_code(q.dtype),
        causal,
        scale,
        torch.get_num_threads(),
    )
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with neighbouring channels; other strides stay."""
    return x if x.stride(-1) == 1 else x.contiguous()
