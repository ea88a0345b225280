"""The folded layer as PyTorch operators, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import folded
from .plan import LayerPlan

torch.library.define(
    "tlfast::hmpnn_layer_fwd",
    "(Tensor[] h, Tensor[] own, Tensor[] p, Tensor[] q, int plan, str impl) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::hmpnn_layer_bwd",
    "(Tensor?[] dout, Tensor[] h, Tensor[] out, Tensor[] pooled, Tensor[] own, Tensor[] p, Tensor[] q, bool need_dh,"
    " int plan, str impl) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("tlfast::hmpnn_layer_fwd", ("cpu", "cuda"))
def _forward(
    h: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    plan: int,
    impl: str,
) -> list[torch.Tensor]:
    out, pooled = folded.forward(h, own, p, q, LayerPlan.of(plan), impl)
    return [*out, *pooled]


@torch.library.register_fake("tlfast::hmpnn_layer_fwd")
def _forward_fake(
    h: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    plan: int,
    impl: str,
) -> list[torch.Tensor]:
    pooled, counts = LayerPlan.of(plan).pooled, LayerPlan.of(plan).num_out
    states = [x.new_empty(count, x.shape[1]) for x, count in zip(h, counts, strict=True)]
    sizes = [(n if into else 0, x.shape[1] * len(into)) for x, n, into in zip(h, counts, pooled, strict=True)]
    return [*states, *(h[0].new_empty(size) for size in sizes)]


@torch.library.impl("tlfast::hmpnn_layer_bwd", ("cpu", "cuda"))
def _backward(
    dout: Sequence[torch.Tensor | None],
    h: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    pooled: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    need_dh: bool,
    plan: int,
    impl: str,
) -> list[torch.Tensor]:
    return folded.backward(dout, h, out, pooled, own, p, q, need_dh, LayerPlan.of(plan), impl)


@torch.library.register_fake("tlfast::hmpnn_layer_bwd")
def _backward_fake(
    dout: Sequence[torch.Tensor | None],
    h: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    pooled: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    need_dh: bool,
    plan: int,
    impl: str,
) -> list[torch.Tensor]:
    return [*(x.new_empty(x.shape if need_dh else 0) for x in h), *(w.new_empty(w.shape) for w in (*own, *p, *q))]


class HmpnnLayer(torch.autograd.Function):
    """Keeps h, the result (for its signs) and what was pooled before it was multiplied."""

    @staticmethod
    def forward(ctx: Any, plan: int, impl: str, types: int, relations: int, *tensors: torch.Tensor) -> Any:
        h, own, p, q = _split(tensors, types, types, relations, relations)
        results = torch.ops.tlfast.hmpnn_layer_fwd.default(h, own, p, q, plan, impl)
        ctx.save_for_backward(*tensors, *results)
        ctx.settings = plan, impl, types, relations
        ctx.set_materialize_grads(False)  # a node type that nobody used costs nothing
        return tuple(results[:types])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        plan, impl, types, relations = ctx.settings
        h, own, p, q, out, pooled = _split(ctx.saved_tensors, types, types, relations, relations, types, types)
        need_dh = any(ctx.needs_input_grad[4 : 4 + types])
        gradients = torch.ops.tlfast.hmpnn_layer_bwd.default(list(dout), h, out, pooled, own, p, q, need_dh, plan, impl)
        if not need_dh:
            gradients[:types] = [None] * types
        return None, None, None, None, *gradients


def _split(tensors: Sequence[torch.Tensor], *counts: int) -> list[list[torch.Tensor]]:
    parts, first = [], 0
    for count in counts:
        parts.append(list(tensors[first : first + count]))
        first += count
    return parts
