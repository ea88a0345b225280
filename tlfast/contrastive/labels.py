"""Means over equal labels, in static shapes: torch.compile takes them, and nothing waits for a GPU."""

from __future__ import annotations

import torch


def group_by_label(labels: torch.Tensor) -> torch.Tensor:
    """(B,) int64 labels -> (B,) numbers in [0, B), the same for equal labels, one of its own for each label -1."""
    ordered, order = labels.sort()
    starts = (ordered != ordered.roll(1)) | (ordered < 0)
    number = starts.cumsum(0) - starts[:1].long()  # the first place starts a group, whatever is in the last
    return torch.empty_like(labels).scatter(0, order, number)


def group_sizes(groups: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B,): how many rows have the group of each."""
    return torch.zeros_like(groups).index_add(0, groups, torch.ones_like(groups))[groups]


def group_means(x: torch.Tensor, groups: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(B, D) -> (B, D) in float32 (float64 for float64): the mean of each row's group, 0 for a group of one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = torch.zeros_like(wide).index_add(0, groups, wide)
    weights = torch.where(sizes > 1, 1 / sizes.to(wide.dtype), 0.0)
    return sums[groups] * weights[:, None]
