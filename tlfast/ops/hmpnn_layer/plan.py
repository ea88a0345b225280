"""What a layer does for each relation of a graph, chosen once by cost; the same for all layers and steps."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..hetero_aggregate.relation import Relation, RelationGroup, tasks_of


@dataclass(frozen=True)
class Correction:
    """Target nodes that a relation's constant term h Q^T is added to (sign 1) or taken from again (sign -1)."""

    relation: int
    rows: torch.Tensor
    sign: float


class LayerPlan:
    """Which relations are multiplied before they are aggregated, and which after: over the smaller of the two sides.

    Args:
        num_nodes: of each node type.
        relations: (source type, relation, target type) of each, types as indices into num_nodes.
        num_out: of each node type how many of its first nodes get new states, as sampled batches need them; None: all.
            Relations lead from num_nodes into num_out.

    Attributes:
        devices: where the relations are.
        used: relations that have edges.
        outgoing[s]: relations from s that multiply the source's features first.
        incoming[t]: of those the ones into t; groups[t] aggregates them in one pass.
        pooled[t]: relations into t that aggregate first; pooled_from[s]: of those the ones from s.
        constant[t]: relations whose term h_t Q^T holds for all nodes of t but those in `corrections[t]`.

    Keeps, for each thread that runs it on the CPU, room for the products of one layer: fresh pages cost more than a
    layer takes to fill them. Relations without edges take no part. A plan lives as long as someone holds it; operators
    know it by `key`.
    """

    _known: ClassVar[weakref.WeakValueDictionary[int, LayerPlan]] = weakref.WeakValueDictionary()
    _keys = itertools.count()

    def __init__(
        self,
        num_nodes: Sequence[int],
        relations: Sequence[tuple[int, Relation, int]],
        num_out: Sequence[int] | None = None,
    ) -> None:
        self.num_nodes, self.relations = tuple(num_nodes), tuple(relations)
        self.num_out = self.num_nodes if num_out is None else tuple(num_out)
        self.devices = tuple({relation.by_target.col.device for _, relation, _ in self.relations})
        types = range(len(self.num_nodes))
        self.used = used = [i for i, (_, relation, _) in enumerate(self.relations) if relation.num_edges]
        first = {i for i in used if self.num_out[self.relations[i][2]] >= self.num_nodes[self.relations[i][0]]}
        self.outgoing = [[i for i in used if i in first and self.relations[i][0] == t] for t in types]
        self.incoming = [[i for i in used if i in first and self.relations[i][2] == t] for t in types]
        self.pooled = [[i for i in used if i not in first and self.relations[i][2] == t] for t in types]
        self.pooled_from = [[i for i in used if i not in first and self.relations[i][0] == t] for t in types]
        self.groups = [RelationGroup([self.relation(i) for i in into]) if into else None for into in self.incoming]
        self.pooled_tasks = [
            tasks_of([self.relation(i).by_source for i in out]) if out else None for out in self.pooled_from
        ]
        self.constant: list[list[int]] = [[] for _ in types]
        self.corrections: list[list[Correction]] = [[] for _ in types]
        for i in used:
            self._split_constant(i)
        self._rooms = threading.local()
        self.key = next(self._keys)
        self._known[self.key] = self

    @classmethod
    def of(cls, key: int) -> LayerPlan:
        """The plan of that key."""
        return cls._known[key]

    def relation(self, i: int) -> Relation:
        """The edges of relation i."""
        return self.relations[i][1]

    def place(self, i: int) -> int:
        """Position of relation i among those that multiply its source's features first."""
        return self.outgoing[self.relations[i][0]].index(i)

    def room(self, t: int, like: torch.Tensor) -> torch.Tensor:
        """Uninitialised (rows, (1 + relations that multiply t first) D), which the next call finds again.

        A row for each node of t, or where no relation multiplies t first for each that gets a new state.
        """
        rows = self.num_nodes[t] if self.outgoing[t] else self.num_out[t]
        shape = rows, like.shape[1] * (1 + len(self.outgoing[t]))
        if like.device.type != "cpu":  # PyTorch keeps memory of GPUs itself, in the order of their streams
            return like.new_empty(shape)
        rooms: dict[Any, torch.Tensor] = self._rooms.__dict__
        if t not in rooms or rooms[t].shape != shape or rooms[t].dtype != like.dtype:
            with torch.inference_mode(False):  # the next call may train
                rooms[t] = torch.empty(shape, dtype=like.dtype)
        return rooms[t]

    def _split_constant(self, i: int) -> None:
        """h Q^T for all targets and taken back where there is no edge, or only where there is one: what is less."""
        target = self.relations[i][2]
        empty = self.relation(i).by_target.degree == 0
        mostly = 2 * int(empty.sum()) <= empty.numel()
        if mostly:
            self.constant[target].append(i)
        rows = (empty if mostly else ~empty).nonzero().flatten()
        if rows.numel():
            self.corrections[target].append(Correction(i, rows, -1.0 if mostly else 1.0))
