"""Adjacency from HeteroData, HeteroGraph and edge lists; HeteroGraph's checks and conversions."""

import pytest
import torch

from tests.ops.graph_cases import make_edges
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, HeteroGraph, as_graph, to_hetero_data

NODES = {"author": 30, "paper": 50, "venue": 4}
RELATIONS = {("author", "writes", "paper"): 120, ("paper", "in", "venue"): 50, ("venue", "cites", "venue"): 0}


def make_graph(**changes):
    edges = {r: make_edges(NODES[r[0]], NODES[r[2]], count) for r, count in RELATIONS.items()}
    x = {t: torch.randn(count, 3 + len(t)) for t, count in NODES.items()}
    y = {"author": torch.arange(30) % 5 - 1, "venue": torch.tensor([[1.0, 0, 2, 0]] * 4)}
    return HeteroGraph(**({"num_nodes": NODES, "edges": edges, "x": x, "y": y, "num_classes": 4} | changes))


def as_sets(adjacency):
    return {r: sorted(map(tuple, adjacency[r].edge_index().t().tolist())) for r in adjacency.edge_types}


def test_edges_and_degrees_are_those_given():
    graph = make_graph()
    adjacency = Adjacency(graph)
    for edge_type, pairs in graph.edges.items():
        relation = adjacency[edge_type]
        assert sorted(map(tuple, relation.edge_index().t().tolist())) == sorted(map(tuple, pairs.t().tolist()))
        assert relation.by_target.degree.tolist() == torch.bincount(pairs[1], minlength=NODES[edge_type[2]]).tolist()
        assert relation.by_source.degree.tolist() == torch.bincount(pairs[0], minlength=NODES[edge_type[0]]).tolist()
        assert relation.t().edge_index().flip(0).t().tolist() == sorted(map(list, pairs.t().tolist()))
        assert relation.by_target.col.dtype == torch.int32
    assert adjacency.num_edges == 170 and adjacency.edge_types == list(RELATIONS)
    assert "writes" in repr(adjacency) and "author" in repr(adjacency)


def test_edge_lists_give_the_same():
    graph = make_graph()
    lists = {edge_type: pairs.to(torch.int32) for edge_type, pairs in graph.edges.items()}
    assert as_sets(Adjacency(lists, NODES)) == as_sets(Adjacency(graph))
    with pytest.raises(InputError, match="num_nodes is missing"):
        Adjacency(lists)


def test_hetero_data_there_and_back():
    pytest.importorskip("torch_geometric")
    graph = make_graph()
    data = to_hetero_data(graph)
    assert data.validate() and data.node_types == list(NODES) and data.num_classes == 4
    back = as_graph(data)
    assert back.num_nodes == NODES and back.edge_types == list(RELATIONS) and back.num_classes == 4
    for kind in ("x", "y", "edges"):
        for name, tensor in getattr(graph, kind).items():
            assert torch.equal(tensor, getattr(back, kind)[name])
    assert as_sets(Adjacency(data)) == as_sets(Adjacency(graph))
    del data["author"].x, data["author"].y
    data["author"].num_nodes = None
    with pytest.raises(InputError, match=r"'author': has neither x nor num_nodes"):
        as_graph(data)


def test_works_without_pytorch_geometric(fresh_process):
    code = """
import sys
sys.modules["torch_geometric"] = None
import torch, tlfast
edges = {("a", "r", "b"): torch.tensor([[0, 1], [0, 0]]), ("b", "s", "a"): torch.tensor([[0, 0], [0, 1]])}
graph = tlfast.graph.HeteroGraph({"a": 2, "b": 1}, edges, {"a": torch.ones(2, 3), "b": torch.ones(1, 4)})
gnn = tlfast.ktn.HMPNN(graph, 8, num_layers=1)
print({t: tuple(h.shape) for t, h in gnn(graph.x, tlfast.graph.Adjacency(graph)).items()})
try:
    tlfast.graph.to_hetero_data(graph)
except ImportError as error:
    print("pip install" in str(error))
"""
    assert fresh_process(code) == "{'a': (2, 8), 'b': (1, 8)}\nTrue"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_nodes": {"author": 30, "paper": 50}}, ["('paper', 'in', 'venue')", "'venue'", "'author', 'paper'"]),
        ({"num_nodes": NODES | {"paper": -1}}, ["'paper'", "0 nodes or more", "-1"]),
        ({"x": {"paper": torch.zeros(49, 2)}}, ["features of 'paper'", "50", "(49, 2)"]),
        ({"x": {"book": torch.zeros(49, 2)}}, ["features of 'book'", "no such node type", "'venue'"]),
        ({"x": {"venue": torch.zeros(4, 2).long()}}, ["features of 'venue'", "floating point", "int64"]),
        (
            {"x": {"venue": torch.tensor([[0.0], [0], [torch.nan], [torch.inf]])}},
            ["features of 'venue'", "2 rows hold NaN or infinity", "row 2"],
        ),
        ({"y": {"venue": torch.tensor([0, 1, 2, 4])}}, ["labels of 'venue'", "below 4", "not 4"]),
        ({"y": {"venue": torch.tensor([0, 1, -2, 3])}}, ["labels of 'venue'", "-1 or a class", "not -2"]),
        ({"y": {"venue": torch.full((4, 2), -1.0)}}, ["labels of 'venue'", "at least 0"]),
    ],
)
def test_bad_graphs(changes, words):
    with pytest.raises(InputError) as error:
        make_graph(**changes)
    for word in words:
        assert word in str(error.value)


def test_bad_edges_and_names():
    graph = make_graph()
    graph.edges["author", "writes", "paper"][1, 7] = 50
    with pytest.raises(InputError, match=r"edges of \('author', 'writes', 'paper'\) names target node 50.*50 nodes"):
        Adjacency(graph)
    with pytest.raises(InputError, match=r"there is no node type 'book'; there are 'author', 'paper', 'venue'"):
        Adjacency({("author", "writes", "book"): torch.zeros(2, 1).long()}, NODES)
    adjacency = Adjacency(make_graph())
    with pytest.raises(InputError, match=r"none such; there are \('author', 'writes', 'paper'\)"):
        _ = adjacency["author", "reads", "paper"]
    with pytest.raises(InputError, match=r"data must be a HeteroData or a HeteroGraph, not int"):
        Adjacency(3)


def test_attributes_of_nodes_are_not_those_of_the_graph():
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    data["a"].x = torch.randn(3, 2)
    data["a"].name = ["one", "two", "three"]
    data["a", "to", "a"].edge_index = torch.zeros(2, 1, dtype=torch.int64)
    before = list(data.node_types)
    assert as_graph(data).name == HeteroGraph({"a": 3}, {}, {}, {}).name
    assert data.node_types == before


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_classes": 0}, ["num_classes", "at least 1", "0"]),
        ({"num_classes": 4.0}, ["num_classes", "whole number", "4.0"]),
        ({"num_classes": True}, ["num_classes", "True"]),
        ({"class_names": "abcd"}, ["class_names", "list", "'abcd'"]),
        ({"class_names": ["a", "b", 3, "d"]}, ["class_names", "list of texts"]),
        ({"class_names": ["a", "b", "a", "d"]}, ["class_names must differ", "'a'"]),
        ({"class_names": ["a", "b"]}, ["2 names", "num_classes is 4"]),
        ({"class_names": ["a", "b"], "num_classes": None}, ["labels of 'author'", "below 2", "3"]),
        ({"class_names": list("abcde"), "num_classes": None}, ["labels of 'venue'", "4 classes", "5"]),
        ({"num_classes": 5}, ["labels of 'venue'", "4 classes", "5"]),
        ({"num_classes": None, "y": {"author": torch.full((30,), -2)}}, ["-1 or a class, not -2"]),
    ],
)
def test_classes_that_do_not_fit_each_other(changes, words):
    with pytest.raises(InputError) as error:
        make_graph(**changes)
    for word in words:
        assert word in str(error.value)


def test_names_alone_say_how_many_classes_there_are():
    assert make_graph(class_names=list("abcd"), num_classes=None).num_classes == 4
