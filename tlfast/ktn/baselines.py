"""What labels alone give, without any learning: the neighbours' vote and label propagation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graph import Adjacency
from ..ops import hetero_aggregate
from .metapaths import Metapath


def vote(labels: torch.Tensor, adjacency: Adjacency, paths: Sequence[Metapath]) -> torch.Tensor:
    """Mean of the labels that a target node's metapaths lead to, averaged over paths, (target nodes, classes).

    labels: of the source nodes that may be known, (source nodes, classes), 0 for the others.
    """
    results = []
    for path in paths:
        reached = labels
        for edge_type in path:
            reached = hetero_aggregate(reached, adjacency[edge_type].t())
        results.append(reached)
    return torch.stack(results).mean(0)


def propagate(
    labels: torch.Tensor, adjacency: Adjacency, source: str, target: str, rounds: int = 20, keep: float = 0.9
) -> torch.Tensor:
    """Labels passed over all relations for some rounds while the known ones stay, (target nodes, classes).

    A round gives each node `keep` times the mean over its relations of the mean over neighbours, and the rest of what
    it had. Source: Zhu and Ghahramani, "Learning from labeled and unlabeled data with label propagation", 2002, with a
    relation as a kind of edge.
    """
    known = labels.sum(1, keepdim=True) > 0
    state = {t: labels.new_zeros(count, labels.shape[1]) for t, count in adjacency.num_nodes.items()}
    state[source] = labels.clone()
    for _ in range(rounds):
        new = {}
        for t, before in state.items():
            into = [edge_type for edge_type in adjacency.edge_types if edge_type[2] == t]
            passed = [hetero_aggregate(state[edge_type[0]], adjacency[edge_type]) for edge_type in into]
            new[t] = torch.stack(passed).mean(0).mul_(keep).add_(before, alpha=1 - keep) if passed else before
        new[source] = torch.where(known, labels, new[source])
        state = new
    return state[target]
