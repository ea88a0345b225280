"""Batches of a large graph: seed nodes and the neighbours that their states depend on, drawn at random."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from ..data.errors import InputError
from ..ops import LayerPlan, Relation, Sampled, sample_neighbours
from .adjacency import Adjacency
from .hetero import EdgeType, there_are

FanOut = int | Mapping[EdgeType, int]


class Sample:
    """Seeds and what was sampled around them, with places in it instead of the graph's numbers.

    Attributes:
        nodes: {type: the graph's numbers of the nodes found, int64}; the seeds first, in their order, then hop by hop.
            x[type][nodes[type]] are their features.
        num_seeds: {type: seeds}.
        hops: how many hops were sampled.
    """

    def __init__(self, sampled: Sampled, node_types: Sequence[str], edge_types: Sequence[EdgeType]) -> None:
        self._sampled, self._node_types, self._edge_types = sampled, tuple(node_types), tuple(edge_types)
        self._index = {node_type: t for t, node_type in enumerate(node_types)}
        self.nodes = dict(zip(node_types, sampled.nodes, strict=True))
        self.num_seeds = {t: counts[0] for t, counts in zip(node_types, sampled.node_counts, strict=True)}
        self.hops = len(sampled.node_counts[0]) - 1 if sampled.node_counts else 0
        self._device = torch.device("cpu")
        self._blocks: dict[int, dict[EdgeType, Relation]] = {}

    @property
    def num_edges(self) -> int:
        """Sampled edges of all relations."""
        return sum(counts[-1] for counts in self._sampled.edge_counts)

    def num_nodes(self, hops: int | None = None) -> dict[str, int]:
        """{type: nodes found within so many hops}; None: all."""
        place = self.hops if hops is None else hops
        return {t: counts[place] for t, counts in zip(self._node_types, self._sampled.node_counts, strict=True)}

    @functools.cached_property
    def adjacency(self) -> Adjacency:
        """All sampled edges between places, targets those nodes that drew any; a node of the last hop has none."""
        return Adjacency.of_relations(self.block(self.hops), self.num_nodes())

    def block(self, hops: int) -> dict[EdgeType, Relation]:
        """Of each relation the edges into nodes found within so many hops, from those found within one hop more."""
        if hops not in self._blocks:
            sources, targets = min(hops + 1, self.hops), self.num_nodes(hops)
            rows = []
            for edge_type, rowptr, col, counts in zip(
                self._edge_types, self._sampled.rowptr, self._sampled.col, self._sampled.edge_counts, strict=True
            ):
                from_nodes = self._sampled.node_counts[self._index[edge_type[0]]][sources]
                rows.append((rowptr[: targets[edge_type[2]] + 1], col[: counts[sources]], from_nodes))
            relations = Relation.from_rows(rows) if rows else []
            found = zip(self._edge_types, relations, strict=True)
            self._blocks[hops] = {edge_type: relation.to(self._device) for edge_type, relation in found}
        return self._blocks[hops]

    def plans(self, node_types: tuple[str, ...], edge_types: tuple[EdgeType, ...], layers: int) -> list[LayerPlan]:
        """Of each of so many layers how it runs: each gives states to those nodes alone that later layers read.

        The first reads all nodes, the last gives states to the seeds.
        Raises InputError where more hops were sampled than layers use, and for a type or relation the sample has not.
        """
        for node_type in node_types:
            if node_type not in self.nodes:
                raise InputError(f"node type {node_type!r}: the sample has none; {there_are(self._node_types)}")
        for edge_type in edge_types:
            if edge_type not in self._edge_types:
                raise InputError(f"relation {edge_type}: the sample has none such; {there_are(self._edge_types)}")
        if self.hops > layers:
            raise InputError(f"{self.hops} hops were sampled, of which {layers} layers use {layers}: sample fewer")
        found = []
        places = {node_type: i for i, node_type in enumerate(node_types)}
        for left in reversed(range(layers)):
            reach = min(left, self.hops)
            block, into, out = self.block(reach), self.num_nodes(min(left + 1, self.hops)), self.num_nodes(reach)
            relations = [(places[edge[0]], block[edge], places[edge[2]]) for edge in edge_types]
            found.append(LayerPlan([into[t] for t in node_types], relations, [out[t] for t in node_types]))
        return found

    def to(self, device: torch.device | str) -> Sample:
        """The same for a model on that device; `nodes` move, the structure when a layer asks for it."""
        moved = Sample(self._sampled, self._node_types, self._edge_types)
        moved.nodes = {node_type: nodes.to(device) for node_type, nodes in self.nodes.items()}
        moved._device = torch.device(device)
        return moved

    def __repr__(self) -> str:
        return f"Sample(seeds {self.num_seeds}, {self.hops} hops, nodes {self.num_nodes()}, {self.num_edges} edges)"


class NeighbourSampler:
    """Draws neighbours of seeds, hop by hop, on all threads; the same seed gives the same on any number of them.

    Args:
        adjacency: `Adjacency` of the whole graph, on the CPU.
        fan_outs: for each hop how many edges a node draws from each relation into its type: one number for all, or
            {(source type, name, target type): number} of every relation; -1 for all edges, 0 for none.
        replace: draw with replacement.

    Raises:
        InputError: fan-outs below -1, or that do not name the relations.

    See `tlfast.ops.sample_neighbours` for what is drawn.
    """

    def __init__(self, adjacency: Adjacency, fan_outs: Sequence[FanOut], replace: bool = False) -> None:
        self.adjacency, self.replace = adjacency, replace
        self.fan_outs = [self._of_hop(hop, fan_out) for hop, fan_out in enumerate(fan_outs)]
        self._node_types, self._edge_types = tuple(adjacency.num_nodes), tuple(adjacency.relations)
        index = {node_type: i for i, node_type in enumerate(self._node_types)}
        self._relations = [(index[s], relation, index[t]) for (s, _, t), relation in adjacency.relations.items()]

    def _of_hop(self, hop: int, fan_out: FanOut) -> list[int]:
        name, relations = f"fan_outs[{hop}]", self.adjacency.edge_types
        if isinstance(fan_out, Mapping):
            for edge_type in fan_out:
                if edge_type not in self.adjacency.relations:
                    raise InputError(f"{name} names the relation {edge_type}; {there_are(relations)}")
            missing = [edge_type for edge_type in relations if edge_type not in fan_out]
            if missing:
                raise InputError(f"{name} lacks the relation {missing[0]}; give it a number, 0 for no edges")
            numbers = [fan_out[edge_type] for edge_type in relations]
        else:
            numbers = [fan_out] * len(relations)
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or number < -1:
                raise InputError(f"{name} must be a number of edges, 0 for none or -1 for all, not {number!r}")
        return numbers

    def sample(self, seeds: Mapping[str, torch.Tensor], seed: int = 0) -> Sample:
        """What seeds {type: (n,) integers} draw.

        Raises InputError for unknown types, numbers out of range, and a node that comes twice.
        """
        for node_type in seeds:
            self.adjacency.count(node_type)
        none = torch.empty(0, dtype=torch.int64)
        starts = [_as_nodes(seeds.get(t, none), t) for t in self._node_types]
        counts = [self.adjacency.num_nodes[t] for t in self._node_types]
        try:
            sampled = sample_neighbours(counts, self._relations, starts, self.fan_outs, self.replace, seed)
        except ValueError as error:
            names = ", ".join(f"{i} is {t!r}" for i, t in enumerate(self._node_types))
            raise InputError(f"{error} (types: {names})") from error
        return Sample(sampled, self._node_types, self._edge_types)


def _as_nodes(seeds: torch.Tensor, node_type: str) -> torch.Tensor:
    if not isinstance(seeds, torch.Tensor) or seeds.is_floating_point() or seeds.is_complex() or seeds.dim() != 1:
        given = f"{tuple(seeds.shape)} {seeds.dtype}" if isinstance(seeds, torch.Tensor) else type(seeds).__name__
        raise InputError(f"seeds of {node_type!r} must be (n,) integers, not {given}")
    if seeds.dtype == torch.bool:
        raise InputError(f"seeds of {node_type!r} must be node numbers, not a mask; pass mask.nonzero().flatten()")
    return seeds.to("cpu", torch.int64)
