"""A batch of pairs that is spread over processes: who holds what, and what travels.

Each process scores its images against the texts of all, so no score is computed twice: rows of the map are complete in
one process, and columns need one number a text from each. Texts travel once, and their gradients back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .checks import DTYPES


class Batch:
    """images (N, D): this process's; texts (M, D): those of all processes, its own from `first` on.

    group None: one process, nothing travels.
    """

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, group: Any) -> None:
        self.images, self.group = images, group
        self.count, self.first, self.processes = len(images), 0, 1
        self.texts, self.total = texts, len(images)
        if group is not None:
            sizes = _sizes(texts, group)
            rank, self.processes = dist.get_rank(group), len(sizes)
            self.first, self.total, self.sizes = sum(sizes[:rank]), sum(sizes), sizes
            self.texts = _Gather.apply(texts, sizes, group)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part of (M, ...)."""
        return x if self.group is None else x[self.first : self.first + self.count]

    def gather_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels if self.group is None else _gather(labels, self.sizes, self.group)

    def combine_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """(M,) log-sum-exps over each process's images -> (N,) over all images, of this process's texts."""
        if self.group is None:
            return columns
        return _CombineColumns.apply(columns, self.first, self.count, self.group)

    def mean(self, total: torch.Tensor) -> torch.Tensor:
        """The mean over all pairs of what each process summed over its own.

        Its gradient is that of the process's own sum times the number of processes: the mean over processes, as
        DistributedDataParallel takes it, is then right.
        """
        if self.group is None:
            return total / self.total
        mine = total * (self.processes / self.total)
        value = total.detach().clone()
        dist.all_reduce(value, group=self.group)
        return mine + (value / self.total - mine.detach())


def _sizes(texts: torch.Tensor, group: Any) -> list[int]:
    """How many pairs each process has; ValueError in all of them where widths or dtypes differ."""
    # by its place: float16 and bfloat16 are of one size
    mine = torch.tensor([*texts.shape, DTYPES.index(texts.dtype)], device=texts.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    sizes, widths, dtypes = torch.stack(found).T.tolist()
    if len(set(widths)) > 1 or len(set(dtypes)) > 1:
        raise ValueError(
            f"image and text must have one width and dtype in all processes, not widths {widths} and dtypes "
            f"{', '.join(str(DTYPES[i]) for i in dtypes)}"
        )
    return sizes


def _gather(x: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    """The processes' rows one behind the other. Collectives want equal sizes, so fewer rows are padded on the way."""
    longest = max(sizes)
    padded = x.new_zeros(longest, *x.shape[1:])
    padded[: len(x)] = x
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rank, total = dist.get_rank(ctx.group), gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        first = sum(ctx.sizes[:rank])
        return total[first : first + ctx.sizes[rank]].clone(), None, None


class _CombineColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: torch.Tensor, first: int, count: int, group: Any) -> torch.Tensor:
        largest = columns.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        largest = largest.masked_fill(largest == -torch.inf, 0.0)  # a batch of one pair: exp(-inf - 0) is 0
        total = (columns - largest).exp()
        dist.all_reduce(total, group=group)
        combined = largest + total.log()
        share = (columns - combined).exp().masked_fill(columns == -torch.inf, 0.0)
        ctx.save_for_backward(share)
        ctx.first, ctx.count, ctx.group = first, count, group
        return combined[first : first + count].clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (share,) = ctx.saved_tensors
        full = torch.zeros_like(share)
        full[ctx.first : ctx.first + ctx.count] = gradient
        dist.all_reduce(full, group=ctx.group)
        return full * share, None, None, None
