"""Means over equal labels, in static shapes: torch.compile takes them, and nothing waits for a GPU."""

from __future__ import annotations

import torch


def group_by_label(labels: torch.Tensor) -> torch.Tensor:
    """(B,) int64 labels -> (B,) numbers in [0, B), the same for equal labels, one of its own for each label -1."""
    ordered, order = labels.sort()
    starts = (ordered != ordered.roll(1)) | (ordered < 0)
    number = starts.cumsum(0) - starts[:1].long()  # the first place starts a group, whatever is in the last
    return torch.empty_like(labels).scatter(0, order, number)


def without_group_mean(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(B, D) -> (B, D) in float32 (float64 for float64): each row minus the mean of its group's rows; 0 if alone."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    counts = wide.new_zeros(len(x)).index_add(0, groups, wide.new_ones(len(x)))
    sums = torch.zeros_like(wide).index_add(0, groups, wide)
    return wide - sums[groups] / counts[groups, None]
