"""The formula of aggregation in plain PyTorch, an edge at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def hetero_aggregate(
    x: Sequence[torch.Tensor],
    rowptr: Sequence[torch.Tensor],
    col: Sequence[torch.Tensor],
    row_scale: Sequence[torch.Tensor | None],
    col_scale: Sequence[torch.Tensor | None],
    base: torch.Tensor | None,
    relu: bool,
) -> torch.Tensor:
    exact = torch.promote_types(x[0].dtype, torch.float32)
    rows = rowptr[0].numel() - 1
    y = x[0].new_zeros((rows, x[0].shape[1]), dtype=exact) if base is None else base.to(exact)
    for features, starts, columns, scale, weight in zip(x, rowptr, col, row_scale, col_scale, strict=True):
        row = torch.searchsorted(starts[1:], torch.arange(columns.numel(), device=columns.device), right=True)
        messages = features.to(exact)[columns.to(torch.int64)]
        if weight is not None:
            messages = messages * weight.to(exact)[columns.to(torch.int64)].unsqueeze(-1)
        pooled = messages.new_zeros((rows, messages.shape[1])).index_add(0, row, messages)
        y = y + (pooled if scale is None else pooled * scale.to(exact).unsqueeze(-1))
    return (torch.relu(y) if relu else y).to(x[0].dtype)
