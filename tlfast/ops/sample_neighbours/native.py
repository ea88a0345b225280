"""Sampling on the CPU: C++ (csrc/ops/cpu/sample_neighbours.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _native
from ..hetero_aggregate.relation import Relation


def sample_neighbours(
    num_nodes: Sequence[int],
    relations: Sequence[tuple[int, Relation, int]],
    seeds: Sequence[torch.Tensor],
    fan_outs: Sequence[Sequence[int]],
    replace: bool,
    seed: int,
) -> tuple[list[torch.Tensor], list[list[int]], list[list[int]], list[torch.Tensor], list[torch.Tensor]]:
    library, types, hops = _native.library(), len(num_nodes), len(fan_outs)
    table = torch.tensor(
        [[r.by_target.rowptr.data_ptr(), r.by_target.col.data_ptr(), s, t] for s, r, t in relations], dtype=torch.int64
    )
    starts, numbers = torch.cat([*seeds]), torch.tensor([len(nodes) for nodes in seeds])
    wanted = torch.tensor([list(hop) for hop in fan_outs], dtype=torch.int64)
    counts = torch.zeros((types + len(relations)) * (hops + 1), dtype=torch.int64)
    handle = torch.zeros(1, dtype=torch.int64)
    library.sample_neighbours_cpu(
        table.data_ptr(),
        starts.data_ptr(),
        numbers.data_ptr(),
        wanted.data_ptr(),
        counts.data_ptr(),
        handle.data_ptr(),
        types,
        len(relations),
        hops,
        seed,
        replace,
        torch.get_num_threads(),
    )
    found = counts.view(-1, hops + 1).tolist()
    node_counts, edge_counts = found[:types], found[types:]
    sizes = [of_type[-1] for of_type in node_counts]
    targets = [target for _, _, target in relations]
    into = torch.tensor(targets, dtype=torch.int64)
    try:
        nodes = torch.empty(sum(sizes), dtype=torch.int64)
        rowptr = torch.empty(sum(sizes[t] + 1 for t in targets), dtype=torch.int32)
        col = torch.empty(sum(of_relation[-1] for of_relation in edge_counts), dtype=torch.int32)
    except BaseException:  # no memory for the result: what waits for it is given back
        library.sample_take_cpu(handle.item(), into.data_ptr(), 0, 0, 0)
        raise
    library.sample_take_cpu(handle.item(), into.data_ptr(), nodes.data_ptr(), rowptr.data_ptr(), col.data_ptr())
    return (
        list(nodes.split(sizes)),
        node_counts,
        edge_counts,
        list(rowptr.split([sizes[t] + 1 for t in targets])),
        list(col.split([of_relation[-1] for of_relation in edge_counts])),
    )
