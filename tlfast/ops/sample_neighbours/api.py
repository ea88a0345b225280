"""Neighbours of seed nodes over several relations, drawn at random, hop by hop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import _dispatch
from ..hetero_aggregate.relation import Relation
from . import native, reference

IMPLEMENTATIONS = ("reference", "native")

_LARGEST_SEED = 2**64 - 1
_LARGEST_FAN_OUT = 2**31 - 1


class Sampled(NamedTuple):
    """What was sampled.

    nodes: of each type the numbers of the nodes found, int64, seeds first, then hop by hop.
    node_counts: of each type how many were found within 0, 1 .. hops hops.
    edge_counts: of each relation how many edges lead into nodes found within fewer hops than 0, 1 .. hops.
    rowptr, col: of each relation compressed rows over the nodes of its target type, int32; col are places in `nodes`
        of its source type, ascending in a row.
    """

    nodes: list[torch.Tensor]
    node_counts: list[list[int]]
    edge_counts: list[list[int]]
    rowptr: list[torch.Tensor]
    col: list[torch.Tensor]


def sample_neighbours(
    num_nodes: Sequence[int],
    relations: Sequence[tuple[int, Relation, int]],
    seeds: Sequence[torch.Tensor],
    fan_outs: Sequence[Sequence[int]],
    replace: bool = False,
    seed: int = 0,
    impl: str = "auto",
) -> Sampled:
    """Draws of each node found in the hop before, and each relation into its type, fan_outs[hop][relation] edges.

    Args:
        num_nodes: of each node type.
        relations: (source type, `Relation`, target type), types as indices into num_nodes; on the CPU.
        seeds: of each type the nodes to start from, int64, no node twice; possibly none.
        fan_outs: a row for each hop, a number for each relation: edges a node, -1 for all, 0 for none.
        replace: draw each edge from all, so that one may come again; a node without edges still gets none. Else each
            edge comes once, and nodes with fewer edges than the fan-out get all.
        seed: the same seed gives the same draws, whatever the number of threads and the implementation; what a node
            draws from a relation depends on nothing else.
        impl: "auto", "reference" (NumPy) or "native" (C++). A named one runs or raises.

    Returns:
        `Sampled`. A node is found once; what it draws is drawn in the hop after.

    Cost, for E sampled edges: a random read of each row and edge, an entry of a hash table each; 16 bytes a node found
    and 4 an edge. Nothing grows with the size of the graph.

    Raises:
        ValueError: seeds or fan-outs that do not fit the graph.
        RuntimeError: the named implementation cannot run here.

    Source: neighbour sampling of Hamilton et al., "Inductive Representation Learning on Large Graphs", NeurIPS 2017
    (arXiv 1706.02216), algorithm 2, a relation at a time; draws without replacement by R. Floyd's algorithm.
    """
    _check(num_nodes, relations, seeds, fan_outs, seed)
    chosen = _dispatch.choose("sample_neighbours", impl, IMPLEMENTATIONS, "cpu", lambda name: None)
    sample = native.sample_neighbours if chosen == "native" else reference.sample_neighbours
    return Sampled(*sample(num_nodes, relations, seeds, fan_outs, replace, seed))


def _check(
    num_nodes: Sequence[int],
    relations: Sequence[tuple[int, Relation, int]],
    seeds: Sequence[torch.Tensor],
    fan_outs: Sequence[Sequence[int]],
    seed: int,
) -> None:
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"seed must be in 0 to 2**64 - 1, not {seed}")
    if len(seeds) != len(num_nodes):
        raise ValueError(f"seeds must be one tensor for each of {len(num_nodes)} types, not {len(seeds)}")
    for hop in fan_outs:
        if len(hop) != len(relations):
            raise ValueError(f"fan_outs must have a number for each of {len(relations)} relations, not {list(hop)}")
        if any(fan_out < -1 for fan_out in hop):
            raise ValueError(f"fan_outs must be numbers of edges, 0 for none or -1 for all, not {list(hop)}")
        if any(fan_out > _LARGEST_FAN_OUT for fan_out in hop):
            raise ValueError(f"fan_outs must be at most {_LARGEST_FAN_OUT}, or -1 for all edges, not {max(hop)}")
    for source, relation, target in relations:
        if (relation.num_sources, relation.num_targets) != (num_nodes[source], num_nodes[target]):
            raise ValueError(f"{relation} does not fit types of {num_nodes[source]} and {num_nodes[target]} nodes")
        if relation.by_target.col.device.type != "cpu":
            raise ValueError(
                f"{relation} is on {relation.by_target.col.device}: sample on the CPU, then move the result"
            )
    for t, (nodes, count) in enumerate(zip(seeds, num_nodes, strict=True)):
        check_seeds(nodes, count, f"seeds[{t}]")


def check_seeds(nodes: torch.Tensor, count: int, name: str) -> None:
    """Seeds of a type with `count` nodes: (n,) int64 on the CPU, in range, none twice; else ValueError."""
    if not isinstance(nodes, torch.Tensor) or nodes.dtype != torch.int64 or nodes.dim() != 1:
        given = f"{tuple(nodes.shape)} {nodes.dtype}" if isinstance(nodes, torch.Tensor) else type(nodes).__name__
        raise ValueError(f"{name} must be (n,) int64 node numbers, not {given}")
    if nodes.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {nodes.device}")
    if not nodes.numel():
        return
    ordered = nodes.sort().values
    for bound in (int(ordered[0]), int(ordered[-1])):
        if not 0 <= bound < count:
            raise ValueError(f"{name} names node {bound}, but its type has {count} nodes, 0 to {count - 1}")
    again = (ordered[1:] == ordered[:-1]).nonzero()
    if again.numel():
        twice = int(ordered[int(again[0])])
        raise ValueError(f"{name} names node {twice} twice; pass each seed once (torch.unique)")
