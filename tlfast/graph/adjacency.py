"""The edges of a heterogeneous graph as the kernels read them, built once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..data.errors import InputError
from ..ops import LayerPlan, Relation
from .hetero import EdgeType, as_graph, there_are


class Adjacency:
    """Every relation's edges in compressed rows, with its transpose and degrees, dealt out to threads by edges.

    Args:
        data: HeteroData, `HeteroGraph`, or edge lists {(source type, name, target type): (2, E) integers}.
        num_nodes: of each node type; needed with edge lists.

    Attributes:
        num_nodes: nodes of each type.
        relations: `tlfast.ops.Relation` of each edge type, in their order; adjacency[edge_type] is one of them.

    Takes 8 bytes an edge and 8 a node of each relation's ends, int32; duplicate edges count twice.

    Raises:
        InputError: an edge that names a node that is not there, edges that are no (2, E) integers, an unknown type.
    """

    def __init__(self, data: Any, num_nodes: Mapping[str, int] | None = None) -> None:
        if isinstance(data, Mapping):
            if num_nodes is None:
                raise InputError("num_nodes is missing: edge lists do not say how many nodes each type has")
            edges, self.num_nodes = dict(data), dict(num_nodes)
        else:
            graph = as_graph(data)
            edges, self.num_nodes = graph.edges, dict(graph.num_nodes)
        self.relations = {edge_type: self._relation(edge_type, pairs) for edge_type, pairs in edges.items()}
        self._plans: dict[tuple[tuple[str, ...], tuple[EdgeType, ...]], LayerPlan] = {}

    def _relation(self, edge_type: EdgeType, edge_index: torch.Tensor) -> Relation:
        for end in (edge_type[0], edge_type[2]):
            if end not in self.num_nodes:
                raise InputError(f"relation {edge_type}: there is no node type {end!r}; {there_are(self.num_nodes)}")
        sources, targets = self.num_nodes[edge_type[0]], self.num_nodes[edge_type[2]]
        try:
            return Relation.from_edges(edge_index, sources, targets, name=f"edges of {edge_type}")
        except ValueError as error:
            raise InputError(str(error)) from error

    def __getitem__(self, edge_type: EdgeType) -> Relation:
        if edge_type not in self.relations:
            raise InputError(f"relation {edge_type}: the adjacency has none such; {there_are(self.relations)}")
        return self.relations[edge_type]

    @property
    def edge_types(self) -> list[EdgeType]:
        """The relations, (source type, name, target type)."""
        return list(self.relations)

    @property
    def num_edges(self) -> int:
        """Edges of all relations."""
        return sum(relation.num_edges for relation in self.relations.values())

    def plan(self, node_types: tuple[str, ...], edge_types: tuple[EdgeType, ...]) -> LayerPlan:
        """How a layer over these types and relations runs, in this order; made once and kept."""
        if (node_types, edge_types) not in self._plans:
            counts = [self.count(node_type) for node_type in node_types]
            places = {node_type: i for i, node_type in enumerate(node_types)}
            relations = [(places[edge[0]], self[edge], places[edge[2]]) for edge in edge_types]
            self._plans[node_types, edge_types] = LayerPlan(counts, relations)
        return self._plans[node_types, edge_types]

    def plans(self, node_types: tuple[str, ...], edge_types: tuple[EdgeType, ...], layers: int) -> list[LayerPlan]:
        """The `plan` of each of so many layers: the same for all."""
        return [self.plan(node_types, edge_types)] * layers

    def count(self, node_type: str) -> int:
        """Nodes of a type."""
        if node_type not in self.num_nodes:
            raise InputError(f"node type {node_type!r}: the adjacency has none; {there_are(self.num_nodes)}")
        return self.num_nodes[node_type]

    @staticmethod
    def of_relations(relations: Mapping[EdgeType, Relation], num_nodes: Mapping[str, int]) -> Adjacency:
        """From relations that are already compressed, which are shared."""
        adjacency = Adjacency({}, num_nodes)
        adjacency.relations = dict(relations)
        return adjacency

    def to(self, device: torch.device | str) -> Adjacency:
        """The same on another device."""
        moved = {edge_type: relation.to(device) for edge_type, relation in self.relations.items()}
        return Adjacency.of_relations(moved, self.num_nodes)

    def __repr__(self) -> str:
        rows = [f"  {edge_type}: {relation.num_edges} edges" for edge_type, relation in self.relations.items()]
        return "\n".join([f"Adjacency({self.num_nodes}", *rows, ")"])
