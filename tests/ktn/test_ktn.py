"""HMPNN and KnowledgeTransfer against the edge-level formula in float64; metapaths; misuse."""

import pytest
import torch

from tests.ktn.cases import NODES, RELATIONS, make_graph
from tests.ktn.plain_ktn import PlainKTN
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency, HeteroGraph
from tlfast.ktn import HMPNN, Classifier, KnowledgeTransfer, metapaths
from tlfast.ktn.classifier import label_distribution
from tlfast.ktn.metapaths import describe

ALLOWED = 1e-5


def assert_near(name, ours, exact, allowed=ALLOWED):
    scale = max(float(exact.detach().abs().max()), 1e-30)
    assert float((ours.double() - exact).detach().abs().max()) <= allowed * scale, name


@pytest.mark.parametrize(
    "source, target, hops", [("paper", "author", 1), ("author", "venue", 2), ("venue", "author", 3)]
)
@pytest.mark.parametrize("relation_dim", [8, 24])
def test_equals_the_edge_level_formula(source, target, hops, relation_dim):
    graph = make_graph()
    gnn, ktn = HMPNN(graph, 16, relation_dim, 3), KnowledgeTransfer(graph, source, target, hops, 16)
    plain, adjacency = PlainKTN(graph, gnn, ktn), Adjacency(graph)
    h, exact = gnn(graph.x, adjacency), plain.hidden()
    for t in NODES:
        assert_near(t, h[t], exact[t])
    loss, exact_loss = ktn.matching_loss(h, adjacency), plain.matching_loss(exact)
    assert_near("loss", loss, exact_loss)
    assert_near("transform", ktn.transform(h[target]), plain.transform(exact[target]))
    (loss + h[target].mean()).backward()
    (exact_loss + exact[target].mean()).backward()
    for module, mirrored in ((gnn, plain.gnn), (ktn, plain.ktn)):
        for name, parameter in module.named_parameters():
            expected = mirrored[name].grad
            expected = torch.zeros_like(mirrored[name]) if expected is None else expected
            assert_near(name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, expected)


def test_a_repeated_relation_shares_its_matrix():
    ktn = KnowledgeTransfer(make_graph(), "paper", "author", hops=3, dim=4)
    cites, writes = ("paper", "cites", "paper"), ("author", "writes", "paper")
    place = ktn.paths.index((cites, cites, writes))
    named = [name for name in ktn.matrices if name.startswith(f"{place}:")]
    assert sorted(named) == [f"{place}:author__writes__paper", f"{place}:paper__cites__paper"]


def test_metapaths_never_pass_through_the_target():
    paths = metapaths(list(RELATIONS), "venue", "paper", 3)
    assert paths == [(("paper", "in", "venue"),)]
    paths = metapaths(list(RELATIONS), "author", "venue", 3)
    assert [len(path) for path in paths] == [2, 3]
    assert describe(paths[1]) == "author <-written_by- paper <-cites- paper <-publishes- venue"
    assert all(begin != "venue" for path in paths for begin, _, _ in path[:-1])


@pytest.mark.parametrize(
    "source, target, hops, words",
    [
        ("author", "venue", 1, ["at most 1 relations", "'venue'", "author': author <-written_by- paper. Raise hops"]),
        ("author", "book", 1, ["target 'book'", "'venue'"]),
        ("author", "author", 1, ["both 'author'"]),
        ("author", "venue", 0, ["hops", "at least 1", "0"]),
    ],
)
def test_no_metapath(source, target, hops, words):
    with pytest.raises(InputError) as error:
        KnowledgeTransfer(make_graph(), source, target, hops)
    for word in words:
        assert word in str(error.value)


def test_bfloat16_is_near():
    graph = make_graph()
    adjacency, exact = Adjacency(graph), HMPNN(graph, 32, num_layers=3)
    half = HMPNN(graph, 32, num_layers=3, dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    h, expected = half(graph.x, adjacency), exact(graph.x, adjacency)
    for t in NODES:
        assert h[t].dtype == torch.bfloat16
        error = (h[t].float() - expected[t]).norm() / expected[t].norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps, t
    ktn = KnowledgeTransfer(graph, "paper", "author", 1, 32)
    (ktn.matching_loss(h, adjacency) + Classifier(32, 3)(h["paper"]).mean()).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())


def test_the_loss_keeps_its_digits_where_the_fit_is_good():
    """Gram matrices in float32 would leave none: the residual is a millionth of the states."""
    edges = {("b", "r", "a"): torch.arange(50).repeat(2, 1)}
    graph = HeteroGraph({"a": 50, "b": 50}, edges)
    ktn = KnowledgeTransfer(graph, "a", "b", 1, 8)
    h = torch.randn(50, 8) + 100
    noise = torch.randn(50, 8) * 1e-3
    with torch.no_grad():
        next(iter(ktn.matrices.values())).copy_(torch.eye(8))
    near = h + noise
    loss = ktn.matching_loss({"a": near, "b": h}, Adjacency(graph))
    expected = (near.double() - h.double()).square().mean()
    assert abs(float(loss) - float(expected)) <= 1e-5 * float(expected)


def test_the_loss_keeps_no_residual():
    graph = make_graph()
    ktn, adjacency = KnowledgeTransfer(graph, "paper", "author", 1, 16), Adjacency(graph)
    h = {t: torch.randn(n, 16, requires_grad=True) for t, n in NODES.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = ktn.matching_loss(h, adjacency)
    large = {t.data_ptr() for t in kept if t.shape == (40, 16)}
    assert len(large) == 2, "the source states, and what the one path brings"
    loss.backward()
    assert h["paper"].grad is not None and h["author"].grad is not None


def test_the_transfer_folds_into_the_classifier():
    ktn, classifier = KnowledgeTransfer(make_graph(), "paper", "author", 2, 16), Classifier(16, 3)
    h = torch.randn(9, 16)
    torch.testing.assert_close(classifier(h, ktn.matrix()), classifier(ktn.transform(h)))


def test_isolated_nodes_and_empty_relations_are_right():
    """A graph without any edges leaves the self term alone."""
    graph = make_graph()
    bare = HeteroGraph(NODES, {r: torch.empty(2, 0).long() for r in RELATIONS}, graph.x)
    gnn = HMPNN(bare, 8, num_layers=2)
    h, exact = gnn(bare.x, Adjacency(bare)), PlainKTN(bare, gnn, KnowledgeTransfer(bare, "paper", "author")).hidden()
    for t in NODES:
        assert_near(t, h[t], exact[t])


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda g: HMPNN(g, 0), ["hidden_dim", "0"]),
        (lambda g: HMPNN(g, 4, 0), ["relation_dim", "0"]),
        (lambda g: HMPNN(g, 4, num_layers=0), ["num_layers", "0"]),
        (lambda g: HMPNN(g, 4, dtype=torch.float16), ["dtype", "bfloat16", "float16"]),
        (lambda g: HMPNN(HeteroGraph(NODES, {}, {}), 4), ["'paper'", "no features"]),
        (lambda g: KnowledgeTransfer(g, "paper", "author", dim=0), ["dim", "0"]),
        (lambda g: HMPNN(g, 4)({}, Adjacency(g)), ["x has no features", "'paper'"]),
        (
            lambda g: HMPNN(g, 4)({**g.x, "paper": torch.zeros(40, 9)}, Adjacency(g)),
            ["'paper'", "(nodes, 5)", "(40, 9)"],
        ),
    ],
)
def test_misuse(build, words):
    with pytest.raises(InputError) as error:
        build(make_graph())
    for word in words:
        assert word in str(error.value)


def test_label_distributions():
    assert label_distribution(torch.tensor([1, -1, 0]), 3).tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    weights = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert label_distribution(weights, None).tolist() == [[0.25, 0.75], [0, 0]]
    with pytest.raises(InputError, match="class 4 is beyond the 3 classes"):
        label_distribution(torch.tensor([4]), 3)
