"""Draws of a few neighbours: as many as asked, of each node's own, right on average, the same for a seed."""

import pytest
import torch

from tests.ops.graph_cases import make_edges
from tlfast.data.errors import InputError
from tlfast.graph import Adjacency
from tlfast.ktn.thinning import Thinning
from tlfast.ops import hetero_aggregate

R, S = ("a", "r", "b"), ("b", "s", "a")


def make(edges=600):
    adjacency = Adjacency({R: make_edges(50, 40, edges), S: make_edges(40, 50, 60)}, {"a": 50, "b": 40})
    return adjacency, adjacency[R].by_target.degree


def draw(thinning, seed):
    return thinning.draw(torch.Generator().manual_seed(seed))


def test_no_node_has_more_and_all_are_its_own():
    adjacency, degree = make()
    drawn = draw(Thinning(adjacency, [R, R], 4), 0)
    assert drawn.edge_types == [R]
    assert torch.equal(drawn[R].by_target.degree, degree.clamp(max=4))
    own = set(map(tuple, adjacency[R].edge_index().t().tolist()))
    assert set(map(tuple, drawn[R].edge_index().t().tolist())) <= own
    for node in (degree <= 4).nonzero().flatten().tolist():
        kept, whole = (a[R].edge_index()[0][a[R].edge_index()[1] == node] for a in (drawn, adjacency))
        assert torch.equal(kept, whole)


def test_the_mean_is_right_on_average():
    adjacency, _ = make()
    x, thinning = torch.randn(50, 8), Thinning(adjacency, [R], 3)
    means = torch.stack([hetero_aggregate(x, draw(thinning, seed)[R]) for seed in range(400)])
    error = (means.mean(0) - hetero_aggregate(x, adjacency[R])).abs()
    assert float((error / (means.std(0) / 20).clamp(min=1e-6)).max()) < 5  # 320 means, each within 5 of its deviations


def test_draws_repeat_for_a_seed_and_differ_otherwise():
    adjacency, _ = make()
    thinning = Thinning(adjacency, [R], 2)
    edges = [draw(thinning, seed)[R].edge_index() for seed in (1, 1, 2)]
    assert torch.equal(edges[0], edges[1]) and not torch.equal(edges[0], edges[2])


def test_a_relation_that_is_thin_already_is_itself():
    adjacency, degree = make()
    assert draw(Thinning(adjacency, [R, S], int(degree.max())), 0)[R] is adjacency[R]
    empty = Adjacency({R: torch.empty(2, 0).long()}, {"a": 3, "b": 2})
    assert draw(Thinning(empty, [R], 1), 0)[R].num_edges == 0


def test_fan_out_below_one_is_refused():
    with pytest.raises(InputError, match="fan_out must be at least 1, not 0"):
        Thinning(make()[0], [R], 0)
