"""The folded formula in plain PyTorch, a relation at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..hetero_aggregate.reference import hetero_aggregate
from .plan import LayerPlan


def hmpnn_layer(
    h: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    plan: LayerPlan,
) -> list[torch.Tensor]:
    dtype = h[0].dtype
    exact = torch.promote_types(dtype, torch.float32)
    h, own, p, q = ([tensor.to(exact) for tensor in tensors] for tensors in (h, own, p, q))
    targets = [features[:count] for features, count in zip(h, plan.num_out, strict=True)]
    z = [F.linear(features, weight) for features, weight in zip(targets, own, strict=True)]
    for (source, relation, target), message, constant in zip(plan.relations, p, q, strict=True):
        rows = relation.by_target
        mean = hetero_aggregate([h[source]], [rows.rowptr], [rows.col], [rows.inverse_degree], [None], None, False)
        linked = (rows.degree > 0).unsqueeze(-1)
        z[target] = z[target] + F.linear(mean, message) + linked * F.linear(targets[target], constant)
    return [torch.relu(state).to(dtype) for state in z]
