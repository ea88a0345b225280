"""The kernels of aggregation as a PyTorch operator, and its gradient: the same aggregation over the transpose."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

torch.library.define(
    "tlfast::hetero_aggregate",
    "(Tensor[] x, Tensor[] rowptr, Tensor[] col, Tensor?[] row_scale, Tensor?[] col_scale, Tensor tasks, Tensor? base,"
    " bool relu, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    return importlib.import_module(f".{impl}", __package__)


@torch.library.impl("tlfast::hetero_aggregate", ("cpu", "cuda"))
def _hetero_aggregate(
    x: Sequence[torch.Tensor],
    rowptr: Sequence[torch.Tensor],
    col: Sequence[torch.Tensor],
    row_scale: Sequence[torch.Tensor | None],
    col_scale: Sequence[torch.Tensor | None],
    tasks: torch.Tensor,
    base: torch.Tensor | None,
    relu: bool,
    impl: str,
) -> torch.Tensor:
    return kernels(impl).hetero_aggregate(x, rowptr, col, row_scale, col_scale, tasks, base, relu)


@torch.library.register_fake("tlfast::hetero_aggregate")
def _hetero_aggregate_fake(
    x: Sequence[torch.Tensor],
    rowptr: Sequence[torch.Tensor],
    col: Sequence[torch.Tensor],
    row_scale: Sequence[torch.Tensor | None],
    col_scale: Sequence[torch.Tensor | None],
    tasks: torch.Tensor,
    base: torch.Tensor | None,
    relu: bool,
    impl: str,
) -> torch.Tensor:
    return x[0].new_empty((rowptr[0].shape[0] - 1, x[0].shape[1]))


class Aggregate(torch.autograd.Function):
    """Keeps the result where it was rectified, for the signs; features are not kept.

    Tensors come flat: x of every relation, then for each what api.both_ways gives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor | None,
        tasks: torch.Tensor,
        relu: bool,
        impl: str,
        count: int,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        x, ways = tensors[:count], tensors[count:]
        rowptr, col, scale = (list(ways[part::6]) for part in range(3))
        none = [None] * count
        y = torch.ops.tlfast.hetero_aggregate.default(list(x), rowptr, col, scale, none, tasks, base, relu, impl)
        ctx.save_for_backward(y if relu else None, *ways)
        ctx.count, ctx.impl = count, impl
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, *ways = ctx.saved_tensors
        if y is not None:
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        gradients: list[torch.Tensor | None] = [None] * (ctx.count * 7)
        for i in range(ctx.count):
            if ctx.needs_input_grad[5 + i]:
                scale, rowptr, col, tasks = ways[6 * i + 2 : 6 * i + 6]
                gradients[i] = torch.ops.tlfast.hetero_aggregate.default(
                    [dy], [rowptr], [col], [None], [scale], tasks, None, False, ctx.impl
                )
        return dy if ctx.needs_input_grad[0] else None, None, None, None, None, *gradients
