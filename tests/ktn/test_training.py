"""Fitting: it learns what only transfer can know, restores the best epoch, repeats itself; baselines; bad input."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.ktn.cases import make_graph
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, HeteroGraph
from tlfast.ktn import HMPNN, scores
from tlfast.ktn.baselines import propagate, vote
from tlfast.ktn.classifier import label_distribution
from tlfast.ktn.training import KtnSettings, KtnTraining, evaluate, fit, source_labels, split


def two_worlds(nodes=60, classes=3, seed=0):
    """Items and users in classes that link to their like; features tell the class, in a rotated space for users."""
    draw = torch.Generator().manual_seed(seed)
    item, user = (torch.arange(nodes) % classes for _ in range(2))
    pairs = torch.stack([torch.randint(nodes, (8 * nodes,), generator=draw) for _ in range(2)])
    pairs = pairs[:, item[pairs[0]] == user[pairs[1]]]
    edges = {("item", "bought_by", "user"): pairs, ("user", "buys", "item"): pairs.flip(0)}
    noise = [0.3 * torch.randn(nodes, 6, generator=draw) for _ in range(2)]
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q
    x = {"item": torch.eye(6)[item] + noise[0], "user": torch.eye(6)[user] @ rotation + noise[1]}
    return HeteroGraph({"item": nodes, "user": nodes}, edges, x, {"item": item, "user": user}, num_classes=classes)


@pytest.fixture(scope="module")
def fitted():
    graph = two_worlds()
    adjacency = Adjacency(graph)
    settings = KtnSettings("item", "user", epochs=60, hidden=16, lr=1e-2)
    return graph, adjacency, settings, fit(graph, adjacency, settings)


def test_what_is_learned_on_one_type_holds_on_the_other(fitted):
    graph, adjacency, _, result = fitted
    found = evaluate(result, graph, adjacency)
    assert found["source"]["accuracy"] > 0.9 and found["target"]["ktn"]["accuracy"] > 0.9
    assert set(found["target"]["ktn"]) == {"accuracy", "micro_f1", "macro_f1", "ndcg", "ndcg_paper", "mrr"}


def test_the_best_epoch_is_restored(fitted):
    graph, adjacency, settings, result = fitted
    labels = source_labels(graph, "item")
    h = result.model.gnn(graph.x, adjacency)
    classifier, dev = result.model.classifier, result.dev
    loss = float(classifier.loss(classifier(h["item"])[dev], labels[dev]))
    loss += settings.matching * float(result.model.transfer.matching_loss(h, adjacency))
    least = min(entry["dev_loss"] for entry in result.history)
    assert loss == pytest.approx(least, rel=1e-5)
    assert result.history[result.best_epoch - 1]["dev_loss"] == least


def test_the_last_steps_weights_are_scored_and_the_first_ones_are_not_kept():
    graph = two_worlds()
    adjacency = Adjacency(graph)
    settings = KtnSettings("item", "user", epochs=1, hidden=8, lr=1e-2)
    initial = KtnTraining(graph, adjacency, settings).result().model.state_dict()
    once, twice = fit(graph, adjacency, settings), fit(graph, adjacency, replace(settings, epochs=2))
    assert (once.best_epoch, len(once.history)) == (1, 1)
    assert all(not torch.equal(tensor, initial[name]) for name, tensor in once.model.state_dict().items())
    assert once.history[0]["dev_loss"] == twice.history[0]["dev_loss"] > twice.history[1]["dev_loss"]
    assert twice.best_epoch == 2


def test_a_fit_that_goes_on_equals_an_unbroken_one(fitted):
    graph, adjacency, settings, whole = fitted
    states = []

    def keep(training):
        states.append(copy.deepcopy(training.state_dict()))
        if len(states) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(graph, adjacency, settings, keep=keep)
    again = fit(graph, adjacency, settings, resumed=states[-1])
    assert again.best_epoch == whole.best_epoch
    for entry, expected in zip(again.history, whole.history, strict=True):
        assert entry | {"seconds": 0} == expected | {"seconds": 0}
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_training_stops_early_and_repeats_itself(fitted):
    graph, adjacency, settings, result = fitted
    again = fit(graph, adjacency, settings)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    other = fit(graph, adjacency, KtnSettings("item", "user", epochs=500, hidden=16, lr=0.5, patience=3, seed=1))
    assert len(other.history) == other.best_epoch + 3 < 500


def test_the_targets_labels_are_never_read(fitted):
    graph, adjacency, settings, result = fitted
    blind = HeteroGraph(graph.num_nodes, graph.edges, graph.x, {"item": graph.y["item"]}, num_classes=3)
    again = fit(blind, adjacency, settings)
    assert torch.equal(again.model.classifier.weight, result.model.classifier.weight)
    assert "target" not in evaluate(again, blind, adjacency)


def test_split_takes_a_tenth_of_each_class():
    y = torch.tensor([0] * 50 + [1] * 20 + [2] * 2 + [-1] * 9)
    labels = label_distribution(y, 3)
    train, dev = split(labels, seed=3)
    assert torch.bincount(y[dev], minlength=3).tolist() == [5, 2, 0]
    assert sorted([*train.tolist(), *dev.tolist()]) == list(range(72))
    assert torch.equal(split(labels, 3)[1], dev) and not torch.equal(split(labels, 4)[1], dev)
    train, dev = split(labels[69:72], 0)
    assert (train.numel(), dev.numel()) == (2, 1)


def test_baselines_on_a_graph_where_neighbours_agree():
    graph = two_worlds()
    adjacency, truth = Adjacency(graph), label_distribution(graph.y["user"], 3)
    labels = label_distribution(graph.y["item"], 3)
    linked = adjacency["item", "bought_by", "user"].by_target.degree > 0
    for predicted in (
        vote(labels, adjacency, [(("user", "buys", "item"),)]),
        propagate(labels, adjacency, "item", "user"),
    ):
        assert scores(predicted[linked], truth[linked])["accuracy"] == 1.0


def test_two_hop_votes_are_means_of_means():
    edges = {("c", "p", "b"): torch.tensor([[0, 1], [0, 0]]), ("b", "q", "a"): torch.tensor([[0, 0], [0, 1]])}
    adjacency = Adjacency(edges, {"a": 2, "b": 1, "c": 2})
    path = (("b", "q", "a"), ("c", "p", "b"))
    assert vote(torch.eye(2), adjacency, [path]).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def without_labels():
    graph = make_graph()
    del graph.y["paper"]
    return graph


@pytest.mark.parametrize(
    "graph, changes, words",
    [
        (without_labels, {}, ["source 'paper'", "no labels", "'author', 'venue'"]),
        (make_graph, {"source": "field"}, ["source 'field'", "no labels"]),
        (make_graph, {"target": "book"}, ["target 'book'"]),
        (make_graph, {"source": "author", "target": "venue"}, ["no path", "Raise hops"]),
        (make_graph, {"lr": 1e30, "epochs": 9}, ["loss is", "learning rate"]),
    ],
)
def test_bad_input(graph, changes, words):
    graph = graph()
    settings = KtnSettings(**({"source": "paper", "target": "author"} | changes))
    with pytest.raises(InputError) as error:
        fit(graph, Adjacency(graph), settings)
    for word in words:
        assert word in str(error.value)


def test_labels_that_are_too_few():
    graph = make_graph()
    graph.y["paper"][1:] = -1
    with pytest.raises(InputError, match="1 nodes have a label"):
        source_labels(graph, "paper")


@pytest.mark.parametrize(
    "changes",
    [{"hops": 0}, {"epochs": 0}, {"hidden": 0}, {"layers": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"matching": -1}],
)
def test_settings_out_of_range(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        KtnSettings("a", "b", **changes)


def test_a_target_without_labels_is_fitted_and_not_scored():
    graph = two_worlds()
    graph.y["user"] = torch.full((60,), -1)
    adjacency = Adjacency(graph)
    result = fit(graph, adjacency, KtnSettings("item", "user", epochs=2, hidden=8))
    assert set(evaluate(result, graph, adjacency)) == {"source"}


def test_labels_of_other_classes_are_refused_before_the_fit():
    graph = two_worlds()
    graph.y["user"] = torch.ones(60, 5)
    with pytest.raises(InputError, match=r"target 'user': y has 5 classes, and the source 3"):
        fit(graph, Adjacency(graph), KtnSettings("item", "user", epochs=10**9))


def test_label_weights_in_float16_do_not_overflow():
    assert label_distribution(torch.tensor([[6e4, 6e4], [0.0, 0.0]]).half(), 2).tolist() == [[0.5, 0.5], [0.0, 0.0]]
    assert label_distribution(torch.zeros(0, dtype=torch.int64), None).shape == (0, 0)


def test_any_name_of_a_type_will_do():
    names = ["items", "a.b", "a#b", "a__b", "_", "type"]
    edges = {(a, r, b): torch.zeros(2, 1, dtype=torch.int64) for a in names for b in names for r in ("keys", "b__c")}
    edges |= {("a__b", "c", "_"): torch.zeros(2, 1, dtype=torch.int64)}
    edges |= {("a", "b__c", "_"): torch.zeros(2, 1, dtype=torch.int64)}
    names.append("a")
    graph = HeteroGraph(dict.fromkeys(names, 2), edges, {name: torch.randn(2, 3) for name in names}, {}, num_classes=2)
    gnn = HMPNN(graph, hidden_dim=4, num_layers=1)
    assert len(gnn.layers[0].message) == len(edges) and len(gnn.adapt) == len(gnn.layers[0].transform) == len(names)
    assert all(h.isfinite().all() for h in gnn(graph.x, Adjacency(graph)).values())


def test_inference_mode_leaves_nothing_behind():
    graph = two_worlds()
    gnn, adjacency = HMPNN(graph, hidden_dim=4, num_layers=1), Adjacency(graph)
    with torch.inference_mode():
        gnn(graph.x, adjacency)
    gnn(graph.x, adjacency)["item"].sum().backward()
    assert all(weight.grad is not None for weight in gnn.layers[0].message.values())
