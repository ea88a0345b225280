"""Sampling in NumPy, a relation and a node at a time, with the random numbers of the native kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..hetero_aggregate.relation import Relation

_BITS = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample_neighbours(
    num_nodes: Sequence[int],
    relations: Sequence[tuple[int, Relation, int]],
    seeds: Sequence[torch.Tensor],
    fan_outs: Sequence[Sequence[int]],
    replace: bool,
    seed: int,
) -> tuple[list[torch.Tensor], list[list[int]], list[list[int]], list[torch.Tensor], list[torch.Tensor]]:
    found = [nodes.tolist() for nodes in seeds]
    places = [{node: i for i, node in enumerate(nodes)} for nodes in found]
    rows: list[list[list[int]]] = [[] for _ in relations]
    node_counts, edge_counts = [[len(nodes)] for nodes in found], [[0] for _ in relations]
    done = [0] * len(found)
    for hop in fan_outs:
        ends = [len(nodes) for nodes in found]
        for r, (source, relation, target) in enumerate(relations):
            for node in found[target][done[target] : ends[target]]:
                new = _draw(relation, r, node, hop[r], replace, seed)
                for neighbour in new:
                    if neighbour not in places[source]:
                        places[source][neighbour] = len(found[source])
                        found[source].append(neighbour)
                rows[r].append(sorted(places[source][neighbour] for neighbour in new))
        done = ends
        for t, nodes in enumerate(found):
            node_counts[t].append(len(nodes))
        for r, lists in enumerate(rows):
            edge_counts[r].append(sum(map(len, lists)))
    degrees = [
        [len(row) for row in lists] + [0] * (len(found[target]) - len(lists))
        for lists, (_, _, target) in zip(rows, relations, strict=True)
    ]
    rowptr = [torch.from_numpy(np.cumsum([0, *degree], dtype=np.int32)) for degree in degrees]
    col = [torch.tensor([place for row in lists for place in row], dtype=torch.int32) for lists in rows]
    return [torch.tensor(nodes, dtype=torch.int64) for nodes in found], node_counts, edge_counts, rowptr, col


def _draw(relation: Relation, r: int, node: int, fan_out: int, replace: bool, seed: int) -> list[int]:
    """Sources of the edges into a node that are drawn, in the order of the edges unless drawn with replacement."""
    first, end = (int(bound) for bound in relation.by_target.rowptr[node : node + 2])
    edges, degree = relation.by_target.col[first:end].tolist(), end - first
    if fan_out < 0 or (not replace and degree <= fan_out):
        return edges
    draws = _Draws(seed, r, node)
    if replace:
        return [edges[draws.below(degree)] for _ in range(fan_out)] if degree else []
    chosen: set[int] = set()
    for last in range(degree - fan_out, degree):
        position = draws.below(last + 1)
        chosen.add(last if position in chosen else position)
    return [edges[i] for i in sorted(chosen)]


class _Draws:
    """splitmix64 from a start that seed, relation and node give."""

    def __init__(self, seed: int, relation: int, node: int) -> None:
        key = _mix((seed + _GOLDEN * (relation + 1)) & _BITS)
        self.state = _mix((key + _GOLDEN * (node + 1)) & _BITS)

    def below(self, count: int) -> int:
        self.state = (self.state + _GOLDEN) & _BITS
        return (_mix(self.state) * count) >> 64


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _BITS
    return x ^ (x >> 31)
