"""HeteroConv against PyG's HeteroConv of mean SAGEConv in float64, where PyG is installed; and alone."""

import pytest
import torch

from tests.graph.test_adjacency import NODES, RELATIONS, make_graph
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency
from tlfast.nn import HeteroConv

OUT = 8
MORE = {("paper", "by", "author"): 90, ("author", "reads", "paper"): 60}


def graph_and_sizes():
    from tests.ops.graph_cases import make_edges

    graph = make_graph()
    graph.edges |= {r: make_edges(NODES[r[0]], NODES[r[2]], n, seed=3) for r, n in MORE.items()}
    return graph, {r: ((graph.x[r[0]].shape[1], graph.x[r[2]].shape[1]), OUT) for r in graph.edges}


def pyg_pair(aggr="sum", **options):
    nn = pytest.importorskip("torch_geometric.nn")
    graph, sizes = graph_and_sizes()
    torch.manual_seed(0)
    theirs = nn.HeteroConv({r: nn.SAGEConv(*size, **options) for r, size in sizes.items()}, aggr)
    ours = HeteroConv({r: nn.SAGEConv(*size, **options) for r, size in sizes.items()}, aggr)
    ours.load_state_dict(theirs.state_dict())
    return graph, theirs, ours


def within_budget(ours, theirs, exact):
    """No worse than PyG in the same dtype, of the largest number."""
    scale = torch.finfo(theirs.dtype).eps * float(exact.detach().abs().max())
    error = float((ours.double() - exact).detach().abs().max())
    assert error <= 1.5 * float((theirs.double() - exact).detach().abs().max()) + 2 * scale


CASES = [(aggr, {}) for aggr in ("sum", "mean", "min", "max", "cat", None)]
CASES += [(aggr, {option: False}) for aggr in ("sum", "cat") for option in ("bias", "root_weight")]


@pytest.mark.parametrize("aggr, options", CASES)
def test_equals_pyg(aggr, options):
    graph, theirs, ours = pyg_pair(aggr, **options)
    x = {t: features.clone().requires_grad_() for t, features in graph.x.items()}
    x_exact = {t: features.double().requires_grad_() for t, features in graph.x.items()}
    x_pyg = {t: features.clone().requires_grad_() for t, features in graph.x.items()}
    edges = {r: pairs.long() for r, pairs in graph.edges.items()}
    found, single = ours(x, Adjacency(graph)), theirs(x_pyg, edges)
    parameters = dict(theirs.named_parameters())
    sum(y.square().sum() for y in single.values()).backward()
    from_pyg = {name: p.grad.clone() for name, p in parameters.items()}
    theirs.double().zero_grad()
    exact = theirs(x_exact, edges)
    sum(y.square().sum() for y in exact.values()).backward()
    sum(y.square().sum() for y in found.values()).backward()
    assert list(found) == list(exact)
    for t in exact:
        within_budget(found[t], single[t], exact[t])
    for t in x:
        within_budget(x[t].grad, x_pyg[t].grad, x_exact[t].grad)
    for name, parameter in ours.named_parameters():
        within_budget(parameter.grad, from_pyg[name], parameters[name].grad)


def test_the_state_goes_both_ways_and_layers_are_shared():
    nn = pytest.importorskip("torch_geometric.nn")
    _, theirs, ours = pyg_pair()
    theirs.load_state_dict(ours.state_dict())
    conv = nn.SAGEConv(6, OUT)
    shared = HeteroConv({("venue", "cites", "venue"): conv})
    assert next(shared.parameters()) is next(conv.parameters())


def test_widths_that_pyg_leaves_open():
    nn = pytest.importorskip("torch_geometric.nn")
    graph, _ = graph_and_sizes()
    ours = HeteroConv({r: nn.SAGEConv((-1, -1), OUT) for r in graph.edges})
    assert all(y.shape == (NODES[t], OUT) for t, y in ours(graph.x, Adjacency(graph)).items())
    assert all(p.shape for p in ours.parameters())


def test_edge_lists_give_what_an_adjacency_gives():
    graph, sizes = graph_and_sizes()
    layer, adjacency = HeteroConv(sizes), Adjacency(graph)
    for t, y in layer(graph.x, adjacency).items():
        assert torch.equal(y, layer(graph.x, graph.edges)[t])
    only = ("paper", "by", "author")
    assert list(layer(graph.x, {only: graph.edges[only], ("x", "y", "z"): None})) == ["author"]


def test_a_node_without_edges_has_its_own_term_and_the_bias():
    layer = HeteroConv({("a", "r", "b"): (2, 3)})
    x = {"a": torch.randn(4, 2), "b": torch.randn(2, 2)}
    y = layer(x, {("a", "r", "b"): torch.tensor([[0, 3], [1, 1]])})["b"]
    conv = layer.convs["<a___r___b>"]
    torch.testing.assert_close(y[0], conv.lin_r(x["b"][0]) + conv.lin_l.bias)
    torch.testing.assert_close(y[1], conv.lin_r(x["b"][1]) + conv.lin_l((x["a"][0] + x["a"][3]) / 2))


def test_nothing_is_as_large_as_the_edges():
    edges = torch.stack([torch.arange(40_000) % 50, torch.arange(40_000) % 60])
    layer = HeteroConv({("a", "r", "b"): (8, 8)})
    x = {"a": torch.randn(50, 8), "b": torch.randn(60, 8)}
    adjacency = Adjacency({("a", "r", "b"): edges}, {"a": 50, "b": 60})
    layer(x, adjacency)["b"].sum().backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        layer(x, adjacency)["b"].sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 40_000 * 8 * 4 / 4


def test_autocast_gives_bfloat16():
    graph, sizes = graph_and_sizes()
    layer, adjacency = HeteroConv(sizes), Adjacency(graph)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(graph.x, adjacency)
    for t, y in layer(graph.x, adjacency).items():
        assert half[t].dtype == torch.bfloat16
        assert float((half[t].float() - y).detach().norm()) < 4 * torch.finfo(torch.bfloat16).eps * float(
            y.detach().norm()
        )


@pytest.mark.parametrize(
    "convs, aggr, words",
    [
        ({}, "sum", ["convs is empty"]),
        ({("a", "r", "b"): (2, 2)}, "median", ["aggr", "'median'", "'mean'"]),
        ({("a", "r", "b"): torch.nn.Linear(2, 2)}, "sum", ["('a', 'r', 'b')", "Linear", "torch_geometric"]),
    ],
)
def test_misuse(convs, aggr, words):
    with pytest.raises(InputError) as error:
        HeteroConv(convs, aggr)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("options", [{"aggr": "max"}, {"normalize": True}, {"project": True}])
def test_other_sage_convs_are_refused(options):
    nn = pytest.importorskip("torch_geometric.nn")
    with pytest.raises(InputError, match=f"must have aggr='mean'.*{next(iter(options))}"):
        HeteroConv({("a", "r", "b"): nn.SAGEConv(2, 2, **options)})


def test_features_and_edges_that_are_missing():
    layer = HeteroConv({next(iter(RELATIONS)): (2, 2)})
    with pytest.raises(InputError, match="x_dict has no 'paper'"):
        layer({"author": torch.zeros(30, 2)}, Adjacency(make_graph()))
    with pytest.raises(InputError, match="node 9"):
        layer(
            {"author": torch.zeros(3, 2), "paper": torch.zeros(5, 2)}, {next(iter(RELATIONS)): torch.tensor([[9], [0]])}
        )
