"""sample_neighbours: the same as in plain Python, whatever the threads; what may be drawn, and how often; bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.graph_cases import make_relation
from tests.ops.norm_cases import needs_native
from tlfast import ops
from tlfast.ops import Relation, sample_neighbours

NODES = (40, 13, 7)
IMPLS = ["reference", pytest.param("native", marks=needs_native)]
FAN_OUTS = [[], [[3] * 6], [[2] * 6, [40] * 6], [[-1] * 6] * 3, [[0, 1, 2, 3, -1, 50]] * 2, [[0] * 6, [5] * 6]]


def make_relations():
    """Both ways, a loop, no edges at all, and few."""
    sizes = [(0, 1, 90), (1, 0, 60), (0, 0, 200), (2, 1, 0), (1, 2, 30), (0, 2, 3)]
    return [(s, make_relation(NODES[s], NODES[t], e, seed=s + t), t) for s, t, e in sizes]


def make_seeds(*seeds):
    return [torch.tensor(nodes, dtype=torch.int64) for nodes in seeds]


@pytest.fixture
def poisoned_integers(monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(-77)

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_same(one, other):
    for part, expected in zip(one, other, strict=True):
        for a, b in zip(part, expected, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


@needs_native
@pytest.mark.usefixtures("poisoned_integers")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("fan_outs", FAN_OUTS, ids=str)
def test_native_is_the_reference_to_the_bit(fan_outs, replace, threads):
    relations = make_relations()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed, seeds in enumerate([([3, 39, 0], [], [6]), ([], [], []), (range(40), range(13), range(7))]):
            arguments = NODES, relations, make_seeds(*map(list, seeds)), fan_outs, replace, seed
            assert_same(sample_neighbours(*arguments, impl="native"), sample_neighbours(*arguments, impl="reference"))
    finally:
        torch.set_num_threads(before)


@needs_native
@given(
    nodes=st.tuples(*[st.integers(1, 400)] * 2),
    edges=st.integers(0, 3000),
    fan_out=st.integers(-1, 70),
    replace=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_size(nodes, edges, fan_out, replace, seed):
    relations = [(0, make_relation(*nodes, edges), 1), (1, make_relation(*nodes[::-1], edges // 2, seed=1), 0)]
    seeds = make_seeds(list(range(0, nodes[0], 3)), [nodes[1] - 1])
    arguments = nodes, relations, seeds, [[fan_out] * 2] * 2, replace, seed
    assert_same(sample_neighbours(*arguments, impl="native"), sample_neighbours(*arguments, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace", [False, True])
def test_edges_are_the_graphs_and_as_many_as_asked_for(impl, replace):
    relations = make_relations()
    fan_outs = [[2, 3, 40, 5, 4, 1], [1, -1, 2, 2, 2, 2]]
    found = sample_neighbours(NODES, relations, make_seeds([3, 39, 0], [5], []), fan_outs, replace, 9, impl)
    for t, nodes in enumerate(found.nodes):
        assert nodes.unique().numel() == nodes.numel() == found.node_counts[t][-1]
    assert found.nodes[0][:3].tolist() == [3, 39, 0] and found.nodes[1][0] == 5
    for r, (source, relation, target) in enumerate(relations):
        rowptr, col, counts = found.rowptr[r].tolist(), found.col[r], found.node_counts[target]
        assert [rowptr[n] for n in [0, *counts[:-1]]] == found.edge_counts[r] and rowptr[-1] == col.numel()
        for place, node in enumerate(found.nodes[target].tolist()):
            drawn = col[rowptr[place] : rowptr[place + 1]].tolist()
            assert drawn == sorted(drawn)
            hop = sum(place >= count for count in counts)
            first, end = relation.by_target.rowptr[node : node + 2].tolist()
            edges = relation.by_target.col[first:end].tolist()
            names = [found.nodes[source][i].item() for i in drawn]
            fan_out = 0 if hop >= len(fan_outs) else fan_outs[hop][r]
            if replace and fan_out >= 0:
                assert len(names) == (fan_out if edges else 0) and set(names) <= set(edges)
            else:
                assert len(names) == (len(edges) if fan_out < 0 else min(fan_out, len(edges)))
                assert all(names.count(name) <= edges.count(name) for name in names)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("replace, degree, fan_out", [(False, 9, 3), (True, 9, 3), (False, 60, 40), (True, 2, 5)])
def test_every_edge_is_as_likely_as_any_other(impl, replace, degree, fan_out):
    """The same degree for many targets; chi-square of how often each position is drawn, and of pairs of positions."""
    targets = 400 if impl == "reference" else 20_000
    edges = torch.stack([torch.arange(degree).repeat(targets), torch.arange(targets).repeat_interleave(degree)])
    relation = [(0, Relation.from_edges(edges, degree, targets), 1)]
    none, seeds = torch.empty(0, dtype=torch.int64), torch.arange(targets)
    found = sample_neighbours((degree, targets), relation, [none, seeds], [[fan_out]], replace, 1, impl)
    drawn = found.nodes[0][found.col[0].long()].view(targets, fan_out)
    times = torch.bincount(drawn.flatten(), minlength=degree).double()
    expected = targets * fan_out / degree
    # without replacement draws of a target exclude each other: the variance is less by (1 - fan_out / degree)
    variance = expected * (1 - (1 / degree if replace else fan_out / degree))
    chi_square = ((times - expected).square() / variance).sum().item()
    assert chi_square < degree + 5 * (2 * degree) ** 0.5
    if not replace:
        assert (drawn.sort(1).values.diff(dim=1) > 0).all()
        both = ((drawn == 0).any(1) & (drawn == degree - 1).any(1)).double().mean().item()
        chance = fan_out * (fan_out - 1) / (degree * (degree - 1))
        assert abs(both - chance) < 5 * (chance * (1 - chance) / targets) ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_node_draws_depends_on_seed_relation_and_node_alone(impl):
    relations = make_relations()

    def drawn(seeds, seed, node):
        found = sample_neighbours(NODES, relations, make_seeds(seeds, [], []), [[4] * 6], seed=seed, impl=impl)
        place = found.nodes[0].tolist().index(node)
        return [
            found.nodes[s][found.col[r][found.rowptr[r][place] : found.rowptr[r][place + 1]].long()].tolist()
            for r, (s, _, t) in enumerate(relations)
            if t == 0
        ]

    assert [sorted(x) for x in drawn([7], 3, 7)] == [sorted(x) for x in drawn([1, 2, 7], 3, 7)]
    assert any(drawn([node], 3, node) != drawn([node], 4, node) for node in range(1, 40))


def test_availability():
    assert set(ops.implementations("sample_neighbours")) == {"reference", "native"}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seeds": make_seeds([40], [], [])}, ["seeds[0]", "node 40", "40 nodes", "0 to 39"]),
        ({"seeds": make_seeds([], [3, -1], [])}, ["seeds[1]", "node -1"]),
        ({"seeds": make_seeds([2, 5, 2], [], [])}, ["seeds[0]", "node 2 twice"]),
        ({"seeds": make_seeds([2], [])}, ["each of 3 types", "2"]),
        ({"seeds": [torch.zeros(1), *make_seeds([], [])]}, ["seeds[0]", "int64", "float32"]),
        ({"seeds": [[1], *make_seeds([], [])]}, ["seeds[0]", "int64", "list"]),
        ({"fan_outs": [[1] * 5]}, ["each of 6 relations", "[1, 1, 1, 1, 1]"]),
        ({"fan_outs": [[1] * 6, [1, -2, 1, 1, 1, 1]]}, ["0 for none or -1 for all", "-2"]),
        ({"fan_outs": [[1] * 5 + [2**31]]}, ["fan_outs", "at most 2147483647", "-1 for all", "2147483648"]),
        ({"fan_outs": [[2**63] * 6], "replace": True}, ["fan_outs", "at most 2147483647", str(2**63)]),
        ({"num_nodes": (41, 13, 7)}, ["does not fit types of 41 and 13"]),
        ({"seed": -1}, ["seed must be", "-1"]),
        ({"seed": 2**64}, ["seed must be", str(2**64)]),
        ({"impl": "fast"}, ["impl='fast'", "sample_neighbours"]),
    ],
)
def test_bad_input(impl, changes, words):
    arguments = {"num_nodes": NODES, "relations": make_relations(), "seeds": make_seeds([1], [], []), "impl": impl}
    with pytest.raises(ValueError) as error:
        sample_neighbours(**{**arguments, "fan_outs": [[1] * 6], **changes})
    for word in words:
        assert word in str(error.value)
