"""A graph of the size and shape of OAG-CS, made from a seed: the real one is a large download."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tlfast.graph import HeteroGraph

NODES = {"paper": 544_244, "author": 510_189, "field": 45_717, "venue": 6_934, "affiliation": 9_079}
# Each pair both ways: 24,019,616 edges of 10 relations. Exponents skew how often the nodes of an end occur: node i of
# n, in a random order, is the end of an edge with a density of (i / n) ** (1 / exponent - 1).
PAIRS = {
    ("author", "writes", "paper", "written_by"): (1_578_308, 1.5, 1.0),
    ("field", "of", "paper", "has"): (5_503_400, 3.0, 1.2),
    ("paper", "cites", "paper", "cited_by"): (3_873_667, 1.2, 2.5),
    ("venue", "publishes", "paper", "published_in"): (544_244, 2.5, 1.0),
    ("affiliation", "employs", "author", "works_at"): (510_189, 2.5, 1.0),
}


def make_graph(width: int = 128, seed: int = 0, scale: float = 1.0, with_features: bool = True) -> HeteroGraph:
    """1,116,163 nodes, 24,019,616 edges with power-law degrees, features (nodes, width); all times `scale`."""
    draw = torch.Generator().manual_seed(seed)
    nodes = {t: max(round(count * scale), 1) for t, count in NODES.items()}
    edges = {}
    for (source, there, target, back), (count, *exponents) in PAIRS.items():
        sides = zip((source, target), exponents, strict=True)
        ends = [_ends(nodes[t], round(count * scale), exponent, draw) for t, exponent in sides]
        edges[source, there, target] = torch.stack(ends)
        edges[target, back, source] = torch.stack(ends[::-1])
    x = {t: torch.randn(count, width, generator=draw) for t, count in nodes.items()} if with_features else {}
    return HeteroGraph(nodes, edges, x, name="OAG-CS-sized")


def _ends(nodes: int, edges: int, exponent: float, draw: torch.Generator) -> torch.Tensor:
    position = torch.rand(edges, generator=draw, dtype=torch.float64).pow_(exponent).mul_(nodes).to(torch.int32)
    return torch.randperm(nodes, generator=draw).to(torch.int32)[position.clamp_(max=nodes - 1)]


def skip_without_memory(needed: float) -> None:
    """Skip a benchmark of this graph where fewer bytes than it needs are free: the system would kill it, or another."""
    free = _available_bytes()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory, has {free / 2**30:.0f}")


def _available_bytes() -> int:
    """Memory that a new process can have; plenty where the system does not say."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return 1 << 60
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])
