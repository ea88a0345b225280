"""Heterogeneous message passing: a training step of HMPNN, and aggregation alone, beside what PyTorch and PyG offer.

On data/dblp of $TLFAST_DATA (default ../shared/data): 37,791 nodes, 341,588 edges, 4 layers of width 128. All are run
in one process, interleaved, and checked to agree first; PyG's HeteroConv of SAGEConv is another function of the same
widths.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tlfast.bench.measure import hook_bytes, medians, timed_rounds
from tlfast.graph import Adjacency, HeteroGraph, read_folder
from tlfast.ktn import HMPNN
from tlfast.ktn.hmpnn import HmpnnLayer, parameter_name
from tlfast.ops import Relation, hetero_aggregate

FOLDER = Path(os.environ.get("TLFAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "dblp"
WIDTH, LAYERS, ROUNDS = 128, 4, 7


@pytest.fixture(scope="module")
def graph() -> HeteroGraph:
    if not FOLDER.is_dir():
        pytest.skip(f"no folder {FOLDER}: set TLFAST_DATA")
    return read_folder(FOLDER)


def row_normalised(relation: Relation) -> torch.Tensor:
    """The relation as a sparse CSR matrix of means."""
    rows = relation.by_target
    values = rows.inverse_degree.repeat_interleave(rows.degree)
    return torch.sparse_csr_tensor(rows.rowptr, rows.col, values, (relation.num_targets, relation.num_sources))


def edge_level(gnn: HMPNN, graph: HeteroGraph) -> dict[str, torch.Tensor]:
    """The formula as written: a message an edge, summed by index_add."""
    h = {t: F.linear(graph.x[t], gnn.adapt[t]) for t in gnn.node_types}
    for layer in gnn.layers:
        assert isinstance(layer, HmpnnLayer)
        new = {}
        for t in gnn.node_types:
            parts = []
            for edge_type in layer.into[t]:
                source, target = graph.edges[edge_type].long()
                pairs = torch.cat([h[edge_type[0]][source], h[t][target]], dim=1)
                messages = F.linear(pairs, layer.message[parameter_name(edge_type)])
                total = messages.new_zeros(graph.num_nodes[t], messages.shape[1]).index_add(0, target, messages)
                degree = torch.bincount(target, minlength=graph.num_nodes[t]).clamp(min=1)
                parts.append(total / degree.unsqueeze(1))
            new[t] = torch.relu(F.linear(torch.cat([*parts, h[t]], dim=1), layer.transform[t]) + h[t])
        h = new
    return h


def folded_in_pytorch(
    gnn: HMPNN, graph: HeteroGraph, matrices: dict[Any, torch.Tensor], empty: dict[Any, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The folded formula with F.linear and torch.sparse.mm, the smaller side multiplied."""
    h = {t: F.linear(graph.x[t], gnn.adapt[t]) for t in gnn.node_types}
    for layer in gnn.layers:
        assert isinstance(layer, HmpnnLayer)
        own, p, q = layer.fold()
        message, constant = dict(zip(gnn.edge_types, p, strict=True)), dict(zip(gnn.edge_types, q, strict=True))
        new = {}
        for t, weight in zip(gnn.node_types, own, strict=True):
            into = layer.into[t]
            z = F.linear(h[t], weight + torch.stack([constant[r] for r in into]).sum(0))
            for r in into:
                if h[r[0]].shape[0] <= h[t].shape[0]:
                    z = z + torch.sparse.mm(matrices[r], F.linear(h[r[0]], message[r]))
                else:
                    z = z + F.linear(torch.sparse.mm(matrices[r], h[r[0]]), message[r])
                if empty[r].numel():
                    z = z.index_add(0, empty[r], F.linear(h[t][empty[r]], constant[r]), alpha=-1)
            new[t] = torch.relu(z)
        h = new
    return h


def pyg_step(graph: HeteroGraph, device: str = "cpu") -> Callable[[], Any] | None:
    """HeteroConv of mean SAGEConv, forward and backward, with edge_index; None without PyG."""
    try:
        from torch_geometric.nn import HeteroConv, SAGEConv
    except ImportError:
        return None
    adapt = torch.nn.ModuleDict({t: torch.nn.Linear(graph.x[t].shape[1], WIDTH, bias=False) for t in graph.node_types})
    adapt.to(device)
    edges = {edge_type: pairs.to(device, torch.int64) for edge_type, pairs in graph.edges.items()}
    features = {t: x.to(device) for t, x in graph.x.items()}
    layers = [HeteroConv({r: SAGEConv(WIDTH, WIDTH) for r in edges}, aggr="sum").to(device) for _ in range(LAYERS)]

    def step() -> None:
        h = {t: adapt[t](x) for t, x in features.items()}
        for layer in layers:
            h = {t: torch.relu(states) for t, states in layer(h, edges).items()}
        total(h).backward()

    return step


def total(h: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([states.float().square().mean() for states in h.values()]).sum()


def test_training_step(benchmark: Any, graph: HeteroGraph) -> None:
    torch.manual_seed(0)
    adjacency = Adjacency(graph)
    gnn = HMPNN(graph, WIDTH, WIDTH, LAYERS)
    half = HMPNN(graph, WIDTH, WIDTH, LAYERS, dtype=torch.bfloat16)
    half.load_state_dict(gnn.state_dict())
    matrices = {r: row_normalised(adjacency[r]) for r in adjacency.edge_types}
    empty = {r: (adjacency[r].by_target.degree == 0).nonzero().flatten() for r in adjacency.edge_types}
    forwards = {
        "ours, float32": lambda: gnn(graph.x, adjacency),
        "ours, bfloat16": lambda: half(graph.x, adjacency),
        "folded, PyTorch": lambda: folded_in_pytorch(gnn, graph, matrices, empty),
        "edge level, PyTorch": lambda: edge_level(gnn, graph),
    }
    with torch.no_grad():
        expected = forwards["edge level, PyTorch"]()
        for name, forward in forwards.items():
            allowed = 3e-2 if "bfloat16" in name else 1e-5
            for t, states in forward().items():
                assert (states.float() - expected[t]).abs().max() <= allowed * expected[t].abs().max(), (name, t)
    steps: dict[str, Callable[[], Any]] = {n: lambda f=f: total(f()).backward() for n, f in forwards.items()}
    slow = {"edge level, PyTorch": steps.pop("edge level, PyTorch")}
    pyg = pyg_step(graph)
    if pyg is not None:
        steps["HeteroConv, PyG"] = pyg
    seconds = medians(timed_rounds(steps, ROUNDS)) | medians(timed_rounds(slow, 2))
    benchmark.pedantic(steps["ours, float32"], rounds=3)
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["saved_bytes"] = {n: hook_bytes(f) for n, f in forwards.items() if n != "folded, PyTorch"}
    peers = {name: value for name, value in seconds.items() if not name.startswith("ours")}
    ours, bf16 = seconds["ours, float32"], seconds["ours, bfloat16"]
    benchmark.extra_info["row"] = {
        "what": f"HMPNN training step on DBLP, {LAYERS} layers of {WIDTH}",
        "ours": f"{1e3 * ours:.0f} ms, bfloat16 {1e3 * bf16:.0f} ms",
        "peer": "; ".join(f"{name} {1e3 * s:.0f} ms ({s / ours:.1f} x)" for name, s in peers.items()),
        "how": "tlfast bench hetero",
    }


@pytest.mark.parametrize("edge_type", [("paper", "mentions", "term"), ("term", "mentioned_in", "paper")], ids=str)
def test_aggregation(benchmark: Any, graph: HeteroGraph, edge_type: tuple[str, str, str]) -> None:
    relation = Adjacency(graph)[edge_type]
    matrix = row_normalised(relation)
    x = torch.randn(relation.num_sources, WIDTH, requires_grad=True)
    dy = torch.randn(relation.num_targets, WIDTH)
    half, dy_half = x.detach().bfloat16().requires_grad_(), dy.bfloat16()
    torch.testing.assert_close(hetero_aggregate(x, relation), torch.sparse.mm(matrix, x), rtol=1e-4, atol=1e-5)
    functions = {
        "ours": lambda: hetero_aggregate(x, relation),
        "torch.sparse.mm": lambda: torch.sparse.mm(matrix, x),
        "ours, bfloat16": lambda: hetero_aggregate(half, relation),
    }
    steps: dict[str, Callable[[], Any]] = {f"{name}, forward": f for name, f in functions.items()}
    for name, f in functions.items():
        gradient = dy_half if "bfloat16" in name else dy
        steps[f"{name}, step"] = lambda f=f, gradient=gradient: f().backward(gradient)
    seconds = medians(timed_rounds(steps, 21))
    benchmark.pedantic(steps["ours, step"], rounds=ROUNDS)
    benchmark.extra_info["seconds"] = seconds
    gathered = 4 * relation.num_edges * WIDTH
    benchmark.extra_info["gathered_bytes_per_second"] = gathered / seconds["ours, forward"]
    figures = {
        name: f"{1e3 * seconds[f'{name}, forward']:.2f} ms, with backward {1e3 * seconds[f'{name}, step']:.2f} ms"
        for name in functions
    }
    benchmark.extra_info["row"] = {
        "what": f"Mean over {relation.num_edges:,} edges, width {WIDTH} ({edge_type[1]})",
        "ours": f"{figures['ours']}; bfloat16 {figures['ours, bfloat16']}",
        "peer": f"torch.sparse.mm {figures['torch.sparse.mm']}",
        "how": "tlfast bench hetero",
    }
