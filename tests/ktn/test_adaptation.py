"""The losses of the baselines against their formulas written out; the baselines on a graph where they can succeed."""

import math

import pytest
import torch

from tests.ktn.test_training import two_worlds
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, HeteroGraph
from tlfast.ktn.adaptation import ADAPTATIONS, MOST_NODES, Cdan, Coral, Dan, Dann, Side, make_adaptation
from tlfast.ktn.adapting import baseline_names, fit_adapted
from tlfast.ktn.classifier import label_distribution
from tlfast.ktn.training import KtnSettings


def sides(n=30, m=20, d=5, shift=0.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=draw), torch.randn(m, d, generator=draw) + shift
    return [Side(x.requires_grad_(), torch.log_softmax(torch.randn(len(x), 3, generator=draw), 1)) for x in h]


def test_coral_is_the_distance_of_covariances():
    source, target = sides()
    with torch.no_grad():
        expected = (torch.cov(source.h.T) - torch.cov(target.h.T)).square().sum() / (4 * 25)
    torch.testing.assert_close(Coral()(source, target, 0.0), expected)


def test_dan_is_the_discrepancy_written_out_pair_by_pair():
    source, target = sides(7, 5)
    both = [*source.h.detach().double(), *target.h.detach().double()]
    width = sum(float((a - b).square().sum()) for a in both for b in both) / len(both) ** 2

    def kernel(a, b):
        return sum(math.exp(-float((a - b).square().sum()) / (width * 2.0**k)) for k in range(-2, 3))

    s, t = both[:7], both[7:]
    expected = sum(kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j) / 42
    expected += sum(kernel(a, b) for i, a in enumerate(t) for j, b in enumerate(t) if i != j) / 20
    expected -= 2 * sum(kernel(a, b) for a in s for b in t) / 35
    assert float(Dan()(source, target, 0.0).detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("loss", [Dan(), Coral()], ids=["dan", "coral"])
def test_distances_are_about_0_for_like_sides_and_grow(loss):
    same, near, far = (float(loss(*sides(400, 400, shift=s), 0.0).detach()) for s in (0.0, 0.5, 2.0))
    if isinstance(loss, Coral):  # covariances do not see a shift: scale instead
        source, target = sides(400, 400)
        near, far = (float(loss(source, Side(target.h * f, target.log_probabilities), 0.0).detach()) for f in (1.5, 3))
    assert abs(same) < 0.05 * far and same < near < far


@pytest.mark.parametrize("kind", [Dann, Cdan])
def test_the_states_get_the_gradient_reversed_and_the_network_its_own(kind):
    source, target = sides()
    module = kind(5, 3)
    module(source, target, 1.0).backward()
    reversed_gradient, own = source.h.grad.clone(), [p.grad.clone() for p in module.parameters()]
    source.h.grad = None
    module.zero_grad()
    logits = [module.discriminator(module.read(side)).squeeze(1) for side in (source, target)]
    plain = -(torch.nn.functional.logsigmoid(logits[0]).mean() + torch.nn.functional.logsigmoid(-logits[1]).mean()) / 2
    plain.backward()
    strength = 2 / (1 + math.exp(-10)) - 1
    torch.testing.assert_close(reversed_gradient, -strength * source.h.grad)
    for gradient, parameter in zip(own, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    module.zero_grad()
    source.h.grad = None
    module(source, target, 0.0).backward()
    assert not source.h.grad.any() and module.discriminator[1].weight.grad.any()


def test_cdan_reads_the_outer_product():
    source, _ = sides()
    rows = Cdan.read(source)
    assert rows.shape == (30, 15)
    torch.testing.assert_close(rows[4].view(3, 5), torch.outer(source.log_probabilities[4].exp(), source.h[4]))


def test_large_sides_are_drawn_from():
    source, _ = sides(MOST_NODES + 9, 2)
    some = source.some(torch.Generator().manual_seed(0))
    assert some.h.shape[0] == MOST_NODES and some.log_probabilities.shape == (MOST_NODES, 3)
    assert sides(9, 2)[0].some(torch.Generator()).h.shape[0] == 9


def test_sides_of_one_node_are_no_error():
    for name in ADAPTATIONS:
        assert torch.isfinite(make_adaptation(name, 5, 3)(*sides(1, 1), 0.5)), name


def alike():
    """Users whose features are the items', so that the source's classifier can read their states."""
    graph = two_worlds()
    graph.x["user"] = torch.eye(6)[graph.y["user"]] + 0.3 * torch.randn(
        60, 6, generator=torch.Generator().manual_seed(3)
    )
    return graph


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_baselines_train_select_and_repeat_themselves(name):
    graph = alike()
    adjacency = Adjacency(graph)
    settings = KtnSettings("item", "user", epochs=40, hidden=16, lr=1e-2)
    epochs = []
    predicted = fit_adapted(name, graph, adjacency, settings, lambda: epochs.append(1))
    assert predicted.shape == (60, 3) and 1 <= len(epochs) <= 40
    torch.testing.assert_close(predicted.exp().sum(1), torch.ones(60))
    blind = HeteroGraph(graph.num_nodes, graph.edges, graph.x, {"item": graph.y["item"]}, num_classes=3)
    assert torch.equal(fit_adapted(name, blind, adjacency, settings), predicted), "the target's labels are never read"


def test_adaptation_makes_the_states_alike():
    """Training on the discrepancy leaves less of it than training without."""
    from tlfast.ktn.adapting import AdaptedModel

    graph = alike()
    adjacency, settings = Adjacency(graph), KtnSettings("item", "user", hidden=16)
    left = {}
    for name in ("none", "dan"):
        torch.manual_seed(0)
        model = AdaptedModel(name, graph, settings, 3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            h = model.gnn(graph.x, adjacency)
            loss = model.classifier.loss(model.classifier(h["item"]), label_distribution(graph.y["item"], 3))
            pair = [Side(h[t], model.classifier(h[t])) for t in ("item", "user")]
            optimizer.zero_grad()
            (loss + model.adaptation(*pair, 1.0)).backward()
            optimizer.step()
        left[name] = float(Dan()(*(Side(side.h.detach(), side.log_probabilities) for side in pair), 1.0))
    assert left["dan"] < 0.5 * left["none"]


def test_one_epoch_is_of_the_weights_after_it():
    graph = alike()
    settings = KtnSettings("item", "user", epochs=1, hidden=16, lr=1e-2)
    assert fit_adapted("none", graph, Adjacency(graph), settings).shape == (60, 3)


def test_a_loss_that_diverges_is_an_error():
    graph = alike()
    with pytest.raises(InputError, match="baseline coral is"):
        fit_adapted("coral", graph, Adjacency(graph), KtnSettings("item", "user", epochs=9, hidden=8, lr=1e30))


def test_a_dev_loss_that_is_never_finite_is_an_error():
    graph = alike()
    settings = KtnSettings("item", "user", epochs=1, hidden=8, lr=1e30)
    with pytest.raises(InputError, match="dev loss of the baseline none is never finite; lower the learning rate"):
        fit_adapted("none", graph, Adjacency(graph), settings)


def test_names():
    assert baseline_names("") == [] and baseline_names("all") == list(ADAPTATIONS)
    assert baseline_names("dan, coral,dan") == ["dan", "coral"]
    with pytest.raises(InputError, match="baselines: 'jan' is none; name some of none, dan, coral, dann, cdan, or all"):
        baseline_names("jan")
