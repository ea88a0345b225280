"""Aggregation on the CPU: C++ (csrc/ops/cpu/hetero_aggregate.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _native


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
    features = [_rows(t) for t in x]
    lines = table(features, rowptr, col, row_scale, col_scale)
    base = None if base is None else _rows(base)
    _native.library().hetero_aggregate_cpu(
        lines.data_ptr(),
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


def table(
    x: Sequence[torch.Tensor],
    rowptr: Sequence[torch.Tensor],
    col: Sequence[torch.Tensor],
    row_scale: Sequence[torch.Tensor | None],
    col_scale: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Of each relation the numbers of struct tl_gather in csrc/tlfast.h."""
    lines = [
        [
            features.data_ptr(),
            starts.data_ptr(),
            columns.data_ptr(),
            _native.pointer(scale),
            _native.pointer(weight),
            features.stride(0),
        ]
        for features, starts, columns, scale, weight in zip(x, rowptr, col, row_scale, col_scale, strict=True)
    ]
    return torch.tensor(lines, dtype=torch.int64, device="cpu")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with neighbouring channels; a stride of rows stays."""
    return x if x.stride(1) == 1 else x.contiguous()
