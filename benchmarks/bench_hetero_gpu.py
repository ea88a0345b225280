"""Heterogeneous message passing on a CUDA GPU: a step on a graph of the size of OAG-CS, aggregation, sampled batches.

The graph is that of benchmarks/oag.py: 1,116,163 nodes, 24,019,616 edges, 10 relations; 4 layers of width 128. Results
are first held against the reference on the CPU, of a smaller graph. Aggregation is counted against the gather that
finds no row in a cache, 4 E D bytes, at the bandwidth of a copy; a step of 64 seeds is a CUDA graph of a fixed sample.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import oag
from benchmarks.bench_hetero import WIDTH, pyg_step, total
from tlfast.bench.measure import medians, timed_rounds
from tlfast.graph import Adjacency, HeteroGraph, NeighbourSampler
from tlfast.graph.loader import features_of
from tlfast.ktn import HMPNN
from tlfast.ops import hetero_aggregate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE, LAYERS, ROUNDS = "cuda", 4, 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def graph() -> Iterator[HeteroGraph]:
    yield oag.make_graph(WIDTH)
    gc.collect()


@pytest.fixture(scope="module")
def adjacency(graph: HeteroGraph) -> Adjacency:
    return Adjacency(graph)


def on_device(graph: HeteroGraph) -> dict[str, torch.Tensor]:
    return {t: x.to(DEVICE) for t, x in graph.x.items()}


def check_step(dtype: torch.dtype) -> None:
    """States and gradients of a graph a hundredth as large, against float32 on the CPU."""
    graph = oag.make_graph(WIDTH, scale=0.01)
    adjacency = Adjacency(graph)
    torch.manual_seed(0)
    gnn = HMPNN(graph, WIDTH, WIDTH, LAYERS)
    there = HMPNN(graph, WIDTH, WIDTH, LAYERS, dtype=dtype)
    there.load_state_dict(gnn.state_dict())
    there.to(DEVICE)
    expected, found = gnn(graph.x, adjacency), there(on_device(graph), adjacency.to(DEVICE))
    allowed = 1e-4 if dtype == torch.float32 else 5e-2
    for t, states in expected.items():
        assert (found[t].float().cpu() - states).abs().max() <= allowed * states.abs().max(), t
    total(expected).backward()
    total(found).backward()
    for (name, mine), weight in zip(there.named_parameters(), gnn.parameters(), strict=True):
        difference = (mine.grad.cpu() - weight.grad).norm() / weight.grad.norm().clamp(min=1e-30)
        assert difference <= 10 * allowed, (name, float(difference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_step(benchmark: Any, graph: HeteroGraph, adjacency: Adjacency, dtype: str) -> None:
    check_step(DTYPES[dtype])
    gnn = HMPNN(graph, WIDTH, WIDTH, LAYERS, dtype=DTYPES[dtype]).to(DEVICE)
    there, x = adjacency.to(DEVICE), on_device(graph)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def step() -> None:
        total(gnn(x, there)).backward()

    functions: dict[str, Callable[[], Any]] = {"ours": step}
    peer = pyg_step(graph, DEVICE) if dtype == "float32" else None
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if peer is not None:
        functions["HeteroConv, PyG"] = peer
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(step, rounds=1)
    others = [f"{n} {1e3 * s:.0f} ms ({s / seconds['ours']:.1f} x)" for n, s in seconds.items() if n != "ours"]
    benchmark.extra_info |= {"seconds": seconds, "peak_bytes": peak}
    benchmark.extra_info["row"] = {
        "what": f"HMPNN training step, OAG-CS-sized, {LAYERS} layers of {WIDTH}, {dtype}",
        "ours": f"{1e3 * seconds['ours']:.1f} ms; peak {peak / 1e9:.1f} GB beyond graph and features",
        "peer": "; ".join(others) or "none in this dtype",
        "how": "bash benchmarks/gpu.sh",
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_aggregation(benchmark: Any, adjacency: Adjacency, dtype: str) -> None:
    relation = adjacency["field", "of", "paper"]
    there = relation.to(DEVICE)
    x = torch.randn(relation.num_sources, WIDTH).to(DTYPES[dtype])
    expected = hetero_aggregate(x.double(), relation)
    on_gpu = x.to(DEVICE)
    found = hetero_aggregate(on_gpu, there, impl="cuda").cpu().double()
    assert (found - expected).abs().max() <= (1e-5 if dtype == "float32" else 2e-2) * expected.abs().max()
    source = torch.empty(1 << 28, device=DEVICE)
    functions = {"ours": lambda: hetero_aggregate(on_gpu, there), "copy": source.clone}
    seconds = medians(timed_rounds(functions, 21))
    benchmark.pedantic(functions["ours"], rounds=ROUNDS)
    bandwidth = 2 * source.nbytes / seconds["copy"]
    bound = relation.num_edges * WIDTH * x.element_size() / bandwidth
    benchmark.extra_info |= {"seconds": seconds, "copy_bytes_per_second": bandwidth}
    benchmark.extra_info["row"] = {
        "what": f"Mean over {relation.num_edges:,} edges, width {WIDTH}, {dtype}",
        "ours": f"{1e3 * seconds['ours']:.2f} ms",
        "peer": f"gather without reuse at {bandwidth / 1e12:.2f} TB/s: {1e3 * bound:.2f} ms"
        f" ({100 * bound / seconds['ours']:.0f} %)",
        "how": "bash benchmarks/gpu.sh",
    }


def test_sampled_step(benchmark: Any, graph: HeteroGraph, adjacency: Adjacency) -> None:
    gnn = HMPNN(graph, WIDTH, WIDTH, 2)
    seeds = {"paper": torch.arange(64)}
    sampler = NeighbourSampler(adjacency, [10, 10])
    sample = sampler.sample(seeds)
    # no graph of these may live on: it would keep nodes that add up gradients on the default stream, out of a capture
    with torch.no_grad():
        expected = gnn(features_of(graph, sample), sample)["paper"]
        gnn.to(DEVICE)
        moved, x = sample.to(DEVICE), {t: f.to(DEVICE) for t, f in features_of(graph, sample).items()}
        found = gnn(x, moved)["paper"].cpu()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    plans = moved.plans(gnn.node_types, gnn.edge_types, 2)
    moved.plans = lambda *_: plans  # type: ignore[method-assign]  # a captured step must not copy from the host

    def step() -> None:
        total({"paper": gnn(x, moved)["paper"]}).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gnn.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    gnn.zero_grad()
    with torch.cuda.graph(captured):
        step()
    functions = {"captured": captured.replay, "eager": step, "sampling": lambda: sampler.sample(seeds, 1)}
    seconds = medians(timed_rounds(functions, 21))
    benchmark.pedantic(captured.replay, rounds=ROUNDS)
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["row"] = {
        "what": f"Training step of 64 seeds, OAG-CS-sized, 2 layers of {WIDTH}, {sample.num_edges:,} sampled edges",
        "ours": f"{1e3 * seconds['captured']:.2f} ms as a CUDA graph",
        "peer": f"eager {1e3 * seconds['eager']:.2f} ms; sampling on the CPU {1e3 * seconds['sampling']:.2f} ms",
        "how": "bash benchmarks/gpu.sh",
    }
