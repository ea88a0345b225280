"""Quantised rows on the CPU: C++ (csrc/ops/cpu/quantise_rows.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_rows


def quantise_rows(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    x_rows = x if x.is_contiguous() else as_rows(x)
    stride = width if x.is_contiguous() else x_rows.stride(0)
    if smooth is not None:
        smooth = smooth.contiguous()
    values = torch.empty(x.shape, dtype=dtype, device="cpu")
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")
    _native.library().quantise_rows_cpu(
        x_rows.data_ptr(),
        _native.pointer(smooth),
        values.data_ptr(),
        scale.data_ptr(),
        scale.numel(),
        width,
        stride,
        _native.dtype_code(x.dtype),
        torch.get_num_threads(),
    )
    return values, scale
