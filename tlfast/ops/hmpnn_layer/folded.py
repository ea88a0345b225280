"""Forward and backward of the folded layer around the kernels of `hetero_aggregate`; nothing here is E x D.

Of a node type s the weights of its own term and of the relations that multiply first stand one below the other, so that
one product reads h_s once; its gradient stands side by side in the same order, so that one product gives dh_s and one
the gradient of all these weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..hetero_aggregate.operator import kernels
from .plan import LayerPlan
from .products import times_transposed, transposed_times

Tensors = Sequence[torch.Tensor]


def forward(
    h: Tensors, own: Tensors, p: Tensors, q: Tensors, plan: LayerPlan, impl: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The new states, and of each type what was pooled before it was multiplied, side by side; (0, 0) for nothing."""
    aggregate = kernels(impl).hetero_aggregate
    width, types = h[0].shape[1], range(len(h))
    products = [_multiply(t, h[t], own, p, q, plan) for t in types]
    pooled, out = [], []
    for t in types:
        z = products[t][: plan.num_out[t], :width]
        pooled.append(_pool(h, t, plan, impl))
        if plan.pooled[t]:
            times_transposed(pooled[t], _side_by_side(t, p, plan).to(z.dtype), add_to=z)
        for correction in plan.corrections[t]:
            term = times_transposed(h[t][correction.rows], q[correction.relation].to(z.dtype))
            z.index_add_(0, correction.rows, term, alpha=correction.sign)
    for t in types:
        z, group = products[t][: plan.num_out[t], :width], plan.groups[t]
        if group is None:
            out.append(torch.relu(z).contiguous())
            continue
        sources = [products[plan.relations[i][0]] for i in plan.incoming[t]]
        places = [1 + plan.place(i) for i in plan.incoming[t]]
        messages = [y[:, width * k : width * (k + 1)] for y, k in zip(sources, places, strict=True)]
        rows = [relation.by_target for relation in group.relations]
        scales, none = [r.inverse_degree for r in rows], [None] * len(rows)
        structure = [r.rowptr for r in rows], [r.col for r in rows], scales, none
        out.append(aggregate(messages, *structure, group.tasks, z, True))
    return out, pooled


def backward(
    dout: Sequence[torch.Tensor | None],
    h: Tensors,
    out: Tensors,
    pooled: Tensors,
    own: Tensors,
    p: Tensors,
    q: Tensors,
    need_dh: bool,
    plan: LayerPlan,
    impl: str,
) -> list[torch.Tensor]:
    """Gradients of h (empty where not needed), own, p, q."""
    width, types = h[0].shape[1], range(len(h))
    used = [gradient is not None for gradient in dout]
    stacked = [_gradients(t, dout, out, width, plan) for t in types]
    dz = [g[:count, :width] for g, count in zip(stacked, plan.num_out, strict=True)]
    dp, dq = [torch.zeros_like(w) for w in p], [torch.zeros_like(w) for w in q]
    dpooled: list[torch.Tensor | None] = [None] * len(h)
    for t in types:
        if used[t]:
            _gather(t, dz[t], stacked, width, plan, impl)
            dpooled[t] = _unpool(t, dz[t], pooled[t], p, dp, need_dh, plan)
    dh, down = [], []
    for s in types:
        gradient, weights = _of_source(s, used, stacked[s], h[s], own, p, q, need_dh, plan)
        down.append(_part(weights, 0, own[s]))
        for k, i in enumerate(plan.outgoing[s], 1):
            dp[i] = _part(weights, k, p[i])
        for i in plan.constant[s]:
            dq[i] = down[s].clone()
        if need_dh:
            _add_pooled(s, gradient, dpooled, width, plan, impl)
        if used[s]:
            _correct(s, dz[s], h[s], gradient, q, dq, need_dh, plan)
        dh.append(gradient)
    return [*dh, *down, *dp, *dq]


def _stacked(t: int, own: Tensors, p: Tensors, q: Tensors, plan: LayerPlan) -> torch.Tensor:
    """Weights that h_t is multiplied by: [own + sum of Q; P of each relation that multiplies first], ((1 + k) D, D)."""
    constant = own[t]
    for i in plan.constant[t]:
        constant = constant + q[i]
    return torch.cat([constant, *(p[i] for i in plan.outgoing[t])])


def _multiply(t: int, h: torch.Tensor, own: Tensors, p: Tensors, q: Tensors, plan: LayerPlan) -> torch.Tensor:
    """All products of h_t side by side, (nodes, (1 + k) D); the own term of nodes without a new state is not filled."""
    room, width = plan.room(t, h), h.shape[1]
    if not room.shape[0]:
        return room
    weight = _stacked(t, own, p, q, plan).to(h.dtype)
    if plan.num_out[t] == plan.num_nodes[t] or not plan.outgoing[t]:
        times_transposed(h[: room.shape[0]], weight, into=room)
    else:
        times_transposed(h[: plan.num_out[t]], weight[:width], into=room[: plan.num_out[t], :width])
        times_transposed(h, weight[width:], into=room[:, width:])
    return room


def _side_by_side(t: int, p: Tensors, plan: LayerPlan) -> torch.Tensor:
    return torch.cat([p[i] for i in plan.pooled[t]], dim=1)


def _part(stacked: torch.Tensor, k: int, like: torch.Tensor) -> torch.Tensor:
    """The k-th square of those one below the other, as a tensor of its own: an operator's results share no memory."""
    width = stacked.shape[1]
    return stacked[width * k : width * (k + 1)].to(like.dtype, copy=True)


def _pool(h: Tensors, t: int, plan: LayerPlan, impl: str) -> torch.Tensor:
    """Means over the relations into t that aggregate first, (N, k D)."""
    relations, width = plan.pooled[t], h[t].shape[1]
    if not relations:
        return h[t].new_empty(0, 0)
    pooled = h[t].new_empty(plan.num_out[t], width * len(relations))
    for k, i in enumerate(relations):
        rows, features = plan.relation(i).by_target, h[plan.relations[i][0]]
        place = pooled[:, width * k : width * (k + 1)]
        structure = [rows.rowptr], [rows.col], [rows.inverse_degree], [None]
        kernels(impl).hetero_aggregate([features], *structure, rows.tasks, None, False, place)
    return pooled


def _gradients(t: int, dout: Sequence[torch.Tensor | None], out: Tensors, width: int, plan: LayerPlan) -> torch.Tensor:
    """[dz_t | room for the gradient of each product that h_t went into], zero where nothing flows back."""
    gradient, stacked, count = dout[t], plan.room(t, out[t]), plan.num_out[t]
    if gradient is None:
        stacked[:, :width] = 0
    else:
        torch.ops.aten.threshold_backward.grad_input(gradient, out[t], 0, grad_input=stacked[:count, :width])
        stacked[count:, :width] = 0
    for k, i in enumerate(plan.outgoing[t], 1):
        if dout[plan.relations[i][2]] is None:
            stacked[:, width * k : width * (k + 1)] = 0
    return stacked


def _gather(t: int, dz: torch.Tensor, stacked: list[torch.Tensor], width: int, plan: LayerPlan, impl: str) -> None:
    """Gradients of what relations into t multiplied first: dz_t over the edges back to the source."""
    for i in plan.incoming[t]:
        source, relation, _ = plan.relations[i]
        k, rows = 1 + plan.place(i), relation.by_source
        structure = [rows.rowptr], [rows.col], [None], [relation.by_target.inverse_degree]
        place = stacked[source][:, width * k : width * (k + 1)]
        kernels(impl).hetero_aggregate([dz], *structure, rows.tasks, None, False, place)


def _unpool(
    t: int,
    dz: torch.Tensor,
    pooled: torch.Tensor,
    p: Tensors,
    dp: list[torch.Tensor],
    need_dh: bool,
    plan: LayerPlan,
) -> torch.Tensor | None:
    """Gradient of what was pooled into t, side by side; fills that of the weights it was multiplied by."""
    relations = plan.pooled[t]
    if not relations:
        return None
    weights = transposed_times(dz, pooled)
    for k, i in enumerate(relations):
        dp[i] = _part(weights.t(), k, p[i]).t().contiguous()
    return times_transposed(dz, _side_by_side(t, p, plan).t().contiguous().to(dz.dtype)) if need_dh else None


def _of_source(
    s: int,
    used: list[bool],
    stacked: torch.Tensor,
    h: torch.Tensor,
    own: Tensors,
    p: Tensors,
    q: Tensors,
    need_dh: bool,
    plan: LayerPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dh_s through its own products, and the gradient of their weights."""
    weights = _stacked(s, own, p, q, plan)
    if not (used[s] or any(used[plan.relations[i][2]] for i in plan.outgoing[s])):
        return torch.zeros_like(h) if need_dh else h.new_empty(0), torch.zeros_like(weights)
    rows = stacked.shape[0]
    gradient = h.new_empty(h.shape if need_dh else 0)
    if need_dh:
        times_transposed(stacked, weights.t().contiguous().to(h.dtype), into=gradient[:rows])
        gradient[rows:] = 0
    return gradient, transposed_times(stacked, h[:rows])


def _add_pooled(
    s: int, gradient: torch.Tensor, dpooled: list[torch.Tensor | None], width: int, plan: LayerPlan, impl: str
) -> None:
    """dh_s through the relations from s that aggregate first, into gradient."""
    parts, rows, scales = [], [], []
    for i in plan.pooled_from[s]:
        _, relation, target = plan.relations[i]
        side_by_side, k = dpooled[target], plan.pooled[target].index(i)
        if side_by_side is not None:
            parts.append(side_by_side[:, width * k : width * (k + 1)])
            rows.append(relation.by_source)
            scales.append(relation.by_target.inverse_degree)
    if parts:
        structure = [r.rowptr for r in rows], [r.col for r in rows], [None] * len(rows), scales
        kernels(impl).hetero_aggregate(parts, *structure, plan.pooled_tasks[s], gradient, False, gradient)


def _correct(
    t: int,
    dz: torch.Tensor,
    h: torch.Tensor,
    gradient: torch.Tensor,
    q: Tensors,
    dq: list[torch.Tensor],
    need_dh: bool,
    plan: LayerPlan,
) -> None:
    """Gradients through the terms h Q^T of single nodes."""
    for correction in plan.corrections[t]:
        i, rows = correction.relation, correction.rows
        dterm = dz[rows]
        dq[i] = dq[i].add(transposed_times(dterm, h[rows]), alpha=correction.sign)
        if need_dh:
            term = times_transposed(dterm, q[i].t().contiguous().to(h.dtype))
            gradient.index_add_(0, rows, term, alpha=correction.sign)
