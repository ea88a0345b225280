"""Small relations with everything that is awkward: nodes without edges, duplicate edges, a hub, no edges at all."""

from __future__ import annotations

import torch

from tlfast.ops import Relation

SIZES = [(1, 1, 1), (5, 7, 0), (63, 65, 200), (100, 3, 400), (4, 90, 60), (300, 200, 3000)]


def make_edges(sources: int, targets: int, edges: int, seed: int = 0) -> torch.Tensor:
    """(2, edges); target 0 gets none where there is another, and every tenth edge comes twice."""
    draw = torch.Generator().manual_seed(seed)
    source = torch.randint(sources, (edges,), generator=draw)
    target = torch.randint(min(1, targets - 1), targets, (edges,), generator=draw)
    pairs = torch.stack([source, target])
    if edges > 1:
        pairs[:, 1::10] = pairs[:, 0:1]
    return pairs


def make_relation(sources: int, targets: int, edges: int, seed: int = 0) -> Relation:
    """A relation of such edges."""
    return Relation.from_edges(make_edges(sources, targets, edges, seed), sources, targets)


def plain_mean(x: torch.Tensor, edges: torch.Tensor, targets: int, reduce: str = "mean") -> torch.Tensor:
    """The formula with PyTorch's scatter at the dtype of x."""
    y = x.new_zeros(targets, x.shape[1])
    return (
        y.index_reduce(0, edges[1], x[edges[0]], "mean", include_self=False)
        if reduce == "mean"
        else y.index_add(0, edges[1], x[edges[0]])
    )
