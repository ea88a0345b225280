"""A small graph for KTN: isolated nodes, a relation without edges, a loop, duplicate edges."""

import torch

from tests.ops.graph_cases import make_edges
from tlfast.graph import HeteroGraph

NODES = {"paper": 40, "author": 30, "venue": 6, "field": 11}
RELATIONS = {
    ("author", "writes", "paper"): 100,
    ("paper", "written_by", "author"): 90,
    ("paper", "in", "venue"): 40,
    ("venue", "publishes", "paper"): 38,
    ("paper", "cites", "paper"): 70,
    ("field", "of", "paper"): 0,
    ("paper", "has", "field"): 60,
}


def make_graph(seed=0):
    torch.manual_seed(seed)
    edges = {r: make_edges(NODES[r[0]], NODES[r[2]], count, seed=i) for i, (r, count) in enumerate(RELATIONS.items())}
    x = {t: torch.randn(count, 5 + i) for i, (t, count) in enumerate(NODES.items())}
    y = {t: torch.randint(0, 3, (NODES[t],)) for t in ("paper", "author", "venue")}
    return HeteroGraph(NODES, edges, x, y, num_classes=3)
