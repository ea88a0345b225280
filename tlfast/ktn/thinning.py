"""Relations with a few neighbours of each node, drawn anew for each step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..data.errors import InputError
from ..graph import Adjacency, EdgeType
from ..ops import Relation


class Thinning:
    """Draws of an adjacency in which no node has more than `fan_out` neighbours in a relation.

    Args:
        adjacency: the whole one. edge_types: relations to thin; the draws have no others.
        fan_out: a node with more neighbours gets as many drawn with replacement, so that its mean over them is right on
            average; a node with no more keeps its own.

    Raises:
        InputError: fan_out below 1.

    Source: KTN's code trains on batches that hold some neighbours of each node, not all: by default one a relation.
    """

    def __init__(self, adjacency: Adjacency, edge_types: Iterable[EdgeType], fan_out: int) -> None:
        if fan_out < 1:
            raise InputError(f"fan_out must be at least 1, not {fan_out}")
        self._adjacency, self._fan_out = adjacency, fan_out
        self._kept: dict[EdgeType, torch.Tensor] = {}
        self._crowded: dict[EdgeType, torch.Tensor] = {}
        for edge_type in dict.fromkeys(edge_types):
            rows = adjacency[edge_type].by_target
            crowded = rows.degree > fan_out
            self._crowded[edge_type] = crowded.nonzero().flatten()
            edges = adjacency[edge_type].edge_index()
            self._kept[edge_type] = edges[:, ~crowded[edges[1]]]

    def draw(self, generator: torch.Generator) -> Adjacency:
        """An adjacency of the thinned relations."""
        drawn = Adjacency({}, self._adjacency.num_nodes)
        drawn.relations = {edge_type: self._draw(edge_type, generator) for edge_type in self._kept}
        return drawn

    def _draw(self, edge_type: EdgeType, generator: torch.Generator) -> Relation:
        relation, crowded = self._adjacency[edge_type], self._crowded[edge_type]
        if not crowded.numel():
            return relation
        rows = relation.by_target
        degree, first = rows.degree[crowded].unsqueeze(1), rows.rowptr[crowded].unsqueeze(1)
        draws = torch.rand(crowded.numel(), self._fan_out, dtype=torch.float64, generator=generator).to(degree.device)
        source = rows.col[(first + (draws * degree).to(torch.int64)).flatten()].to(torch.int64)
        chosen = torch.stack([source, crowded.repeat_interleave(self._fan_out)])
        edges = torch.cat([self._kept[edge_type], chosen], dim=1)
        return Relation.from_edges(edges, relation.num_sources, relation.num_targets, name=f"edges of {edge_type}")
