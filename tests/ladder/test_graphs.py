"""Side blocks as CUDA graphs, with a stand-in that runs a captured function again on the CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.ladder.test_tap_storage import assert_same, gradients, ladder
from tests.models import examples_of
from tlfast.ladder import fused, graphs

FAMILIES = ["bert", "gpt2", "llama", "t5"]


@pytest.fixture
def replayed(monkeypatch):
    """Captures on the CPU at the second call of a shape; how often something was captured, and replayed."""
    seen = {"captured": 0, "replayed": 0}

    def captured(function, device, pool):
        result = function()
        seen["captured"] += 1

        def replay():
            seen["replayed"] += 1
            for place, tensor in zip(_listed(result), _listed(function()), strict=True):
                if place is not None:
                    place.copy_(tensor)

        return result, torch.no_grad()(replay) if isinstance(result, torch.Tensor) else replay

    def allowed(block, x):
        return graphs._is_plain(block)

    monkeypatch.setattr(graphs, "_captured", captured)
    monkeypatch.setattr(graphs, "_can_be_captured", allowed)
    monkeypatch.setattr(graphs, "_CALLS", 2)
    monkeypatch.setattr(fused, "why_not", lambda *_: "graphs are tested")
    return seen


def _listed(result):
    return [result] if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_blocks(family, replayed, monkeypatch):
    batches = [examples_of(family, seed) for seed in range(3)]
    ours = gradients(ladder("keep", family, 0.2), *batches)
    assert replayed["captured"] and replayed["replayed"] > replayed["captured"]
    monkeypatch.setattr(graphs, "_can_be_captured", lambda block, x: False)
    assert_same(ours, gradients(ladder("keep", family, 0.2), *batches))


def test_all_blocks_share_one_pair_of_graphs(replayed):
    model = ladder("keep", "bert")
    model(**examples_of("bert")).loss.backward()
    assert len(model.side.blocks) > 1 and replayed["captured"] == 2


def test_a_new_shape_has_graphs_of_its_own_and_the_oldest_go(replayed, monkeypatch):
    monkeypatch.setattr(graphs, "_SHAPES", 2)
    model = ladder("keep", "bert")
    made = model.side.blocks[0].graphs._made
    shapes = []
    for length in (4, 5, 6):
        inputs = {"input_ids": torch.ones(2, length, dtype=torch.long), "labels": torch.zeros(2).long()}
        model(**inputs).loss.backward()
        shapes.append(list(made)[-1])
    assert replayed["captured"] == 6 and list(made) == shapes[1:]


def test_shapes_that_never_recur_are_forgotten(replayed, monkeypatch):
    monkeypatch.setattr(graphs, "_COUNTED", 2)
    monkeypatch.setattr(graphs, "_CALLS", 3)
    model = ladder("keep", "bert", layers=[0])
    kept = model.side.blocks[0].graphs
    for length in (4, 5, 6, 4, 5, 6, 6, 6):
        inputs = {"input_ids": torch.ones(2, length, dtype=torch.long), "labels": torch.zeros(2).long()}
        model(**inputs).loss.backward()
        assert len(kept._calls) <= 2
    assert replayed["captured"] == 2 and len(kept._made) == 1


def test_what_a_graph_cannot_show_runs_eagerly(replayed):
    model, seen = ladder("keep", "bert"), []
    for block in model.side.blocks:
        block.attention.register_forward_hook(lambda *_: seen.append(1))
    model(**examples_of("bert")).loss.backward()
    assert seen and not replayed["captured"]
    with torch.no_grad():
        ladder("keep", "bert")(**examples_of("bert"))
    assert not replayed["captured"]


def test_frozen_weights_get_no_gradient(replayed):
    model = ladder("keep", "bert")
    for block in model.side.blocks:
        block.attention.qkv.weight.requires_grad_(False)
    model(**examples_of("bert")).loss.backward()
    assert replayed["captured"]
    for block in model.side.blocks:
        assert block.attention.qkv.weight.grad is None and block.attention.qkv.bias.grad is not None


def test_copies_have_no_graphs(replayed):
    model = ladder("keep", "bert")
    model(**examples_of("bert")).loss.backward()
    kept = model.side.blocks[0].graphs
    assert kept._made
    for other in (copy.deepcopy(model.side), pickle.loads(pickle.dumps(model.side))):
        assert not other.blocks[0].graphs._made
        assert other.blocks[0].graphs is other.blocks[1].graphs


def test_on_a_cpu_nothing_is_captured():
    model = ladder("keep", "bert")
    for _ in range(2):
        model(**examples_of("bert")).loss.backward()
    assert not model.side.blocks[0].graphs._made
