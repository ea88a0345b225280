"""Relations as the native kernels take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _native


def gathers(
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


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x with neighbouring channels; a stride of rows stays."""
    return x if x.stride(1) == 1 else x.contiguous()
