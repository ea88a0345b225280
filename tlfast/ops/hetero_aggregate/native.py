"""Aggregation on the CPU: C++ (csrc/ops/cpu/hetero_aggregate.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _native
from ._gathers import gathers, rows_of


def hetero_aggregate(
    x: Sequence[torch.Tensor],
    rowptr: Sequence[torch.Tensor],
    col: Sequence[torch.Tensor],
    row_scale: Sequence[torch.Tensor | None],
    col_scale: Sequence[torch.Tensor | None],
    tasks: torch.Tensor,
    base: torch.Tensor | None,
    relu: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """out: where to write, (rows, D) with neighbouring channels; it may be base."""
    rows, width = rowptr[0].numel() - 1, x[0].shape[1]
    y = torch.empty(rows, width, dtype=x[0].dtype, device="cpu") if out is None else out
    features = [rows_of(t) for t in x]
    table = gathers(features, rowptr, col, row_scale, col_scale)
    base = None if base is None else rows_of(base)
    _native.library().hetero_aggregate_cpu(
        table.data_ptr(),
        _native.pointer(base),
        y.data_ptr(),
        tasks.data_ptr(),
        tasks.shape[0],
        len(features),
        width,
        0 if base is None else base.stride(0),
        y.stride(0),
        _native.dtype_code(y.dtype),
        relu,
        torch.get_num_threads(),
    )
    return y
