"""Sum and norm on the CPU: C++ (csrc/ops/cpu/matrix/norm_tap.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_rows
from .reference import Quantised


def norm_tap(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    quantise: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor, Quantised | None]:
    width = x.shape[-1]
    x_rows, x_stride = _rows(x)
    residual_rows, residual_stride = (None, 0) if residual is None else _rows(residual)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    quantised = None
    if quantise is not None:
        values = torch.empty(x.shape, dtype=quantise, device="cpu")
        quantised = values, torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
    _native.library().norm_tap_cpu(
        x_rows.data_ptr(),
        _native.pointer(residual_rows),
        _native.pointer(weight),
        _native.pointer(bias),
        _native.pointer(total),
        y.data_ptr(),
        0 if quantised is None else quantised[0].data_ptr(),
        0 if quantised is None else quantised[1].data_ptr(),
        x.numel() // width,
        width,
        x_stride,
        residual_stride,
        _native.dtype_code(x.dtype),
        rms,
        eps,
        torch.get_num_threads(),
    )
    return total, y, quantised


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, or a copy with neighbouring channels, and the stride of its rows."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = as_rows(x)
    return rows, rows.stride(0)
