"""Samples and batches: what is in them, states of seeds as on the whole graph, loaders that repeat themselves."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.ktn.cases import NODES, RELATIONS, make_graph
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, HeteroGraph, NeighbourLoader, NeighbourSampler
from tlfast.graph.loader import features_of
from tlfast.ktn import HMPNN

SEEDS = {"paper": torch.tensor([7, 0, 39]), "venue": torch.tensor([5])}


def named_edges(sample, edge_type):
    pairs = sample.adjacency[edge_type].edge_index()
    ends = [sample.nodes[t][places].tolist() for t, places in zip(edge_type[::2], pairs, strict=True)]
    return sorted(zip(*ends, strict=True))


def test_all_neighbours_are_the_subgraph_around_the_seeds():
    graph = make_graph()
    sample = NeighbourSampler(Adjacency(graph), [-1]).sample(SEEDS)
    assert sample.num_seeds == {"paper": 3, "author": 0, "venue": 1, "field": 0}
    assert sample.nodes["paper"][:3].tolist() == [7, 0, 39] and sample.nodes["venue"][0] == 5
    for edge_type, pairs in graph.edges.items():
        seeds = SEEDS.get(edge_type[2], torch.empty(0, dtype=torch.int64))
        wanted = pairs[:, torch.isin(pairs[1], seeds)]
        assert named_edges(sample, edge_type) == sorted(map(tuple, wanted.t().tolist())), edge_type
    assert "paper" in repr(sample) and str(sample.num_edges) in repr(sample)


@pytest.mark.parametrize("blocked", [False, pytest.param(True, id="without the native library")])
def test_transposes_fit(blocked, monkeypatch):
    if blocked:
        monkeypatch.setattr("tlfast._native.why_not", lambda: "blocked")
    sample = NeighbourSampler(Adjacency(make_graph()), [3, 3]).sample(SEEDS, seed=1)
    for hops in range(3):
        for edge_type, relation in sample.block(hops).items():
            there, back = relation.by_target, relation.by_source
            pairs = relation.edge_index()
            fresh = type(relation).from_edges(pairs, relation.num_sources, relation.num_targets)
            assert relation.num_targets == sample.num_nodes(hops)[edge_type[2]]
            for name in ("rowptr", "col", "columns", "inverse_degree", "tasks"):
                for mine, expected in ((there, fresh.by_target), (back, fresh.by_source)):
                    a, b = getattr(mine, name), getattr(expected, name)
                    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (edge_type, name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layers, hops", [(1, 1), (2, 2), (3, 3), (3, 1), (2, 0)])
def test_states_of_seeds_are_those_of_the_whole_graph(layers, hops):
    """With all neighbours; with fewer hops than layers the states are those of the graph that was sampled."""
    graph = make_graph()
    adjacency = Adjacency(graph)
    sample = NeighbourSampler(adjacency, [-1] * hops).sample(SEEDS)
    torch.manual_seed(0)
    gnn = HMPNN(graph, 8, num_layers=layers)
    x = features_of(graph, sample)
    h = gnn(x, sample)
    if hops == layers:
        whole = {t: states[SEEDS[t]] for t, states in gnn(graph.x, adjacency).items() if t in SEEDS}
    else:
        whole = {t: states[: sample.num_seeds[t]] for t, states in gnn(x, sample.adjacency).items()}
    gradients = []
    for states in (h, whole):
        gnn.zero_grad(set_to_none=True)
        sum((states[t] * (1 + i)).square().sum() for i, t in enumerate(SEEDS)).backward()
        gradients.append([torch.zeros_like(w) if w.grad is None else w.grad for w in gnn.parameters()])
    for t in SEEDS:
        torch.testing.assert_close(h[t], whole[t], rtol=1e-5, atol=1e-5)
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert {t: len(states) for t, states in h.items()} == {t: len(SEEDS.get(t, ())) for t in NODES}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layers", [2, 3])
def test_trimmed_layers_are_the_whole_sample(layers):
    graph = make_graph()
    sample = NeighbourSampler(Adjacency(graph), [3] * layers, replace=True).sample(SEEDS, seed=4)
    gnn, x = HMPNN(graph, 8, num_layers=layers, dtype=torch.float64).double(), features_of(graph, sample)
    for t, states in gnn(x, sample).items():
        torch.testing.assert_close(states, gnn(x, sample.adjacency)[t][: sample.num_seeds[t]])


def test_fan_outs_by_relation():
    adjacency = Adjacency(make_graph())
    only = {edge_type: 2 if edge_type[1] == "writes" else 0 for edge_type in RELATIONS}
    sample = NeighbourSampler(adjacency, [only]).sample(SEEDS)
    assert {e for e in RELATIONS if sample.adjacency[e].num_edges} == {("author", "writes", "paper")}
    assert NeighbourSampler(adjacency, [0, 4]).sample(SEEDS).num_edges == 0


def test_isolated_nodes_empty_relations_and_no_seeds():
    edges = {("a", "r", "b"): torch.empty(2, 0, dtype=torch.int64), ("b", "s", "a"): torch.tensor([[0, 0], [1, 1]])}
    graph = HeteroGraph({"a": 3, "b": 2}, edges, {"a": torch.randn(3, 2), "b": torch.randn(2, 3)})
    sampler = NeighbourSampler(Adjacency(graph), [5, 5])
    alone = sampler.sample({"a": torch.tensor([2]), "b": torch.tensor([1])})
    assert alone.num_edges == 0 and alone.num_nodes() == {"a": 1, "b": 1}
    twice = sampler.sample({"a": torch.tensor([1])})
    assert twice.adjacency["b", "s", "a"].edge_index().tolist() == [[0, 0], [0, 0]]  # the edge that comes twice
    gnn = HMPNN(graph, 4, num_layers=2)
    for seeds in ({}, {"a": torch.tensor([2])}, {"a": torch.tensor([1])}):
        sample = sampler.sample(seeds)
        h = gnn(features_of(graph, sample), sample)
        assert h["a"].shape == (len(seeds.get("a", ())), 4) and h["a"].isfinite().all()
    assert sampler.sample({}).num_nodes() == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    "fan_outs, words",
    [
        ([-2], ["fan_outs[0]", "-2", "-1 for all"]),
        ([3, 1.5], ["fan_outs[1]", "1.5"]),
        ([True], ["fan_outs[0]", "True"]),
        ([{("author", "writes", "paper"): 3}], ["fan_outs[0] lacks", "('paper', 'written_by', 'author')"]),
        ([{("author", "reads", "paper"): 3}], ["('author', 'reads', 'paper')", "there are"]),
    ],
)
def test_bad_fan_outs(fan_outs, words):
    with pytest.raises(InputError) as error:
        NeighbourSampler(Adjacency(make_graph()), fan_outs)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "seeds, words",
    [
        ({"book": torch.tensor([1])}, ["'book'", "there are 'paper'"]),
        ({"paper": torch.tensor([40])}, ["node 40", "40 nodes", "0 is 'paper'"]),
        ({"author": torch.tensor([-1])}, ["node -1", "1 is 'author'"]),
        ({"paper": torch.tensor([4, 4])}, ["node 4 twice", "torch.unique"]),
        ({"paper": torch.tensor([4.0])}, ["'paper'", "integers", "float32"]),
        ({"paper": torch.ones(40, dtype=torch.bool)}, ["'paper'", "mask"]),
        ({"paper": torch.ones(2, 2).long()}, ["'paper'", "(2, 2)"]),
        ({"paper": [1, 2]}, ["'paper'", "list"]),
    ],
)
def test_bad_seeds(seeds, words):
    with pytest.raises(InputError) as error:
        NeighbourSampler(Adjacency(make_graph()), [2]).sample(seeds)
    for word in words:
        assert word in str(error.value)


def test_plans_of_what_was_not_sampled():
    sample = NeighbourSampler(Adjacency(make_graph()), [2]).sample(SEEDS)
    other = ("author", "reads", "paper")
    with pytest.raises(
        InputError, match=r"'reads', 'paper'\): the sample has none such; there are \('author', 'writes'"
    ):
        sample.plans(tuple(NODES), (*RELATIONS, other), 1)
    with pytest.raises(InputError, match="node type 'book': the sample has none; there are 'paper', 'author'"):
        sample.plans((*NODES, "book"), tuple(RELATIONS), 1)


def test_more_hops_than_layers():
    graph = make_graph()
    sample = NeighbourSampler(Adjacency(graph), [2, 2, 2]).sample(SEEDS)
    with pytest.raises(InputError, match="3 hops were sampled, of which 2 layers use 2"):
        HMPNN(graph, 4, num_layers=2)(features_of(graph, sample), sample)


def make_loader(**changes):
    graph = make_graph()
    seeds = {"paper": torch.arange(40), "venue": torch.arange(6)}
    settings = {"batch_size": 7, "seed": 3} | changes
    return graph, NeighbourLoader(graph, NeighbourSampler(Adjacency(graph), [2, 2]), seeds, **settings)


def as_numbers(batches):
    return [{t: nodes.tolist() for t, nodes in batch.sample.nodes.items()} for batch in batches]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_every_seed_comes_once_an_epoch(prefetch):
    graph, loader = make_loader(prefetch=prefetch)
    batches = list(loader)
    assert len(batches) == len(loader) == 7
    for t, count in (("paper", 40), ("venue", 6)):
        seen = torch.cat([batch.sample.nodes[t][: batch.sample.num_seeds[t]] for batch in batches])
        assert sorted(seen.tolist()) == list(range(count))
    for batch in batches:
        for t, x in batch.x.items():
            assert torch.equal(x, graph.x[t][batch.sample.nodes[t]])


def test_without_shuffling_one_type_comes_after_the_other():
    graph = make_graph()
    seeds = {"paper": torch.arange(6), "author": torch.arange(3)}
    loader = NeighbourLoader(graph, NeighbourSampler(Adjacency(graph), [1]), seeds, 3, shuffle=False)
    counts = [(b.sample.num_seeds["paper"], b.sample.num_seeds["author"]) for b in loader]
    assert counts == [(3, 0), (3, 0), (0, 3)]


def test_loaders_repeat_themselves_and_change_from_epoch_to_epoch():
    loaders = [make_loader(prefetch=prefetch)[1] for prefetch in (0, 2)]
    first, second = ([as_numbers(loader) for _ in range(2)] for loader in loaders)
    assert first == second and first[0] != first[1]
    assert as_numbers(make_loader(seed=4)[1]) != first[0]
    _, plain = make_loader(shuffle=False)
    assert [batch.sample.nodes["paper"][:7].tolist() for batch in plain][1] == list(range(7, 14))


def test_leaving_early_ends_the_thread():
    _, loader = make_loader(batch_size=1, prefetch=1)
    for _ in loader:
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "tlfast-neighbours"]


def test_an_error_in_the_thread_is_raised():
    _, loader = make_loader()
    loader.seeds["paper"] = torch.arange(1, 41)
    with pytest.raises(InputError, match="node 40"):
        list(loader)


@pytest.mark.parametrize("changes, words", [({"batch_size": 0}, "batch_size"), ({"prefetch": -1}, "prefetch")])
def test_bad_loaders(changes, words):
    with pytest.raises(InputError, match=words):
        make_loader(**changes)
    graph = make_graph()
    with pytest.raises(InputError, match="seeds are empty"):
        NeighbourLoader(graph, NeighbourSampler(Adjacency(graph), [1]), {"paper": torch.empty(0).long()}, 3)


@pytest.mark.gpu
def test_states_of_seeds_on_a_gpu():
    graph = make_graph()
    sample = NeighbourSampler(Adjacency(graph), [3, 3]).sample(SEEDS)
    gnn, x = HMPNN(graph, 8, num_layers=2), features_of(graph, sample)
    expected = gnn(x, sample)
    found = gnn.cuda()({t: features.cuda() for t, features in x.items()}, sample.to("cuda"))
    for t, states in expected.items():
        torch.testing.assert_close(found[t].cpu(), states, rtol=1e-4, atol=1e-4)


def test_moving_a_sample():
    sample = NeighbourSampler(Adjacency(make_graph()), [2]).sample(SEEDS).to("meta")
    assert sample.nodes["paper"].device.type == "meta"
    assert sample.block(0)["author", "writes", "paper"].by_target.col.device.type == "meta"
