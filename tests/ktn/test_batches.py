"""Fitting on sampled batches: the losses of the whole graph where all neighbours are drawn, learning, repetition."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.ktn.cases import make_graph
from tests.ktn.test_training import two_worlds
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, NeighbourLoader
from tlfast.ktn.batches import BatchTraining, TransferSampler, batch_losses, fit_batches
from tlfast.ktn.training import KtnModel, KtnSettings, KtnTraining, evaluate, run_to_end, source_labels


@pytest.mark.parametrize(
    "source, target, hops, layers",
    [("paper", "author", 1, 2), ("author", "venue", 2, 1), ("venue", "field", 3, 2), ("paper", "venue", 3, 1)],
)
def test_losses_are_those_of_the_whole_graph(source, target, hops, layers):
    """All seeds in one batch, all edges drawn; the last paths meet seeds and each other's nodes again."""
    graph = make_graph()
    adjacency = Adjacency(graph)
    graph.y[source] = torch.arange(graph.num_nodes[source]) % 3
    settings = KtnSettings(source, target, hops, hidden=8, layers=layers)
    labels = source_labels(graph, source)
    torch.manual_seed(0)
    model = KtnModel(graph, settings, 3)
    seeds = torch.randperm(graph.num_nodes[source])
    sampler = TransferSampler(adjacency, source, target, model.transfer.paths, layers, matched=10**6, neighbours=10**6)
    (batch,) = NeighbourLoader(graph, sampler, {source: seeds}, len(seeds))
    classification, matching, predicted, _ = batch_losses(model, batch, labels)
    found = torch.autograd.grad(classification + matching, list(model.parameters()), allow_unused=True)
    h = model.gnn(graph.x, adjacency)
    exact = model.classifier(h[source]), model.transfer.matching_loss(h, adjacency)
    loss = model.classifier.loss(exact[0], labels) + exact[1]
    wanted = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    order = batch.sample.nodes[source][: batch.sample.seeds]
    torch.testing.assert_close(predicted, exact[0][order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matching, exact[1], rtol=1e-5, atol=1e-6)
    for (name, weight), a, b in zip(model.named_parameters(), found, wanted, strict=True):
        a, b = (torch.zeros_like(weight) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_matching_of_some_seeds_is_the_mean_over_them():
    graph = make_graph()
    adjacency = Adjacency(graph)
    model = KtnModel(graph, KtnSettings("paper", "author", 1, hidden=8), 3)
    seeds = torch.tensor([3, 17, 5])
    sampler = TransferSampler(adjacency, "paper", "author", model.transfer.paths, 2, matched=10**6, neighbours=10**6)
    (batch,) = NeighbourLoader(graph, sampler, {"paper": seeds}, 3, shuffle=False)
    _, matching, _, _ = batch_losses(model, batch, source_labels(graph, "paper"))
    h = model.gnn(graph.x, adjacency)
    relation = adjacency["author", "writes", "paper"].by_target
    total = torch.zeros(())
    for seed in seeds.tolist():
        into = relation.col[relation.rowptr[seed] : relation.rowptr[seed + 1]].long()
        reached = h["author"][into].mean(0) if into.numel() else torch.zeros(8)
        total = total + (h["paper"][seed] - reached @ model.transfer.matrix()).square().sum()
    torch.testing.assert_close(matching, total / (3 * 8), rtol=1e-5, atol=1e-6)


def test_what_is_learned_on_one_type_holds_on_the_other_and_repeats_itself():
    graph = two_worlds(nodes=120)
    adjacency = Adjacency(graph)
    settings = KtnSettings("item", "user", epochs=12, hidden=16, lr=1e-2, batch_size=16, neighbours=3)
    told = []
    fitted = fit_batches(graph, adjacency, settings, told.append)
    found = evaluate(fitted, graph, adjacency)
    assert found["source"]["accuracy"] > 0.9 and found["target"]["ktn"]["accuracy"] > 0.9
    assert told == fitted.history and set(told[0]) == {
        "epoch", "loss", "matching", "dev_loss", "dev_accuracy", "seconds"
    }  # fmt: skip
    assert fitted.best_epoch == min(told, key=lambda entry: entry["dev_loss"])["epoch"]
    again = fit_batches(graph, adjacency, settings)
    for name, tensor in fitted.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_state_goes_on_as_if_never_broken_off():
    graph = two_worlds()
    settings = KtnSettings("item", "user", epochs=6, hidden=8, batch_size=16, neighbours=3)
    arguments = graph, Adjacency(graph), settings
    whole, kept = fit_batches(*arguments), []
    first = BatchTraining(*arguments)
    for _ in range(3):
        first.run_epoch()
    again = fit_batches(*arguments, resumed=copy.deepcopy(first.state_dict()), keep=kept.append)
    assert len(kept) == 3
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize("training", [BatchTraining, KtnTraining])
def test_an_epoch_whose_dev_loss_is_not_finite_is_never_the_best(training, monkeypatch):
    graph = two_worlds()
    settings = KtnSettings("item", "user", epochs=3, hidden=8, batch_size=60, neighbours=2)
    dev = iter([float("nan"), 3.0, float("-inf") * 0])
    take = training._take
    monkeypatch.setattr(training, "_take", lambda self, entry: take(self, entry | {"dev_loss": next(dev)}))
    assert run_to_end(training(graph, Adjacency(graph), settings), print, print, None).best_epoch == 2
    dev = iter([float("nan"), float("inf"), float("nan")])
    with pytest.raises(InputError, match="the dev loss is never finite; lower the learning rate"):
        run_to_end(training(graph, Adjacency(graph), settings), print, print, None)


def test_a_dev_loss_that_diverges_at_once_is_an_error():
    graph = two_worlds()
    settings = KtnSettings("item", "user", epochs=1, hidden=8, lr=1e30, batch_size=60)
    with pytest.raises(InputError, match="the dev loss is never finite"):
        fit_batches(graph, Adjacency(graph), settings)


def test_it_stops_early():
    graph = two_worlds()
    settings = KtnSettings("item", "user", epochs=500, hidden=8, lr=0.5, patience=2, batch_size=30, neighbours=2)
    fitted = fit_batches(graph, Adjacency(graph), settings)
    assert len(fitted.history) == fitted.best_epoch + 2 < 500


def test_settings_out_of_range():
    for changes in ({"batch_size": -1}, {"batch_size": 5, "neighbours": 0}):
        with pytest.raises(InputError, match=list(changes)[-1]):
            KtnSettings("a", "b", **changes)
    graph = two_worlds()
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        fit_batches(graph, Adjacency(graph), KtnSettings("item", "user"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"source": "field"}, "no labels"),
        ({"source": "author", "target": "venue"}, "no path"),
        ({"lr": 1e30, "epochs": 9}, "loss is"),
    ],
)
def test_bad_input(changes, words):
    graph = make_graph()
    settings = KtnSettings(**({"source": "paper", "target": "author", "hidden": 8, "batch_size": 8} | changes))
    with pytest.raises(InputError, match=words):
        fit_batches(graph, Adjacency(graph), settings)
