"""Side blocks as CUDA graphs on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ladder.test_tap_storage import assert_same, gradients, ladder
from tests.ladder.test_tap_storage_gpu import on_gpu
from tests.models import examples_of
from tlfast.ladder import graphs

pytestmark = pytest.mark.gpu


def of_ladder(family, batches, calls, monkeypatch, autocast=False):
    """Gradients, and the side network, whose blocks run as graphs from that many calls on."""
    monkeypatch.setattr(graphs, "_CALLS", calls)
    model = ladder("keep", family, 0.2).cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        return gradients(model, *batches), model.side


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_gradients_are_those_of_eager_blocks(family, monkeypatch):
    batches = [on_gpu(examples_of(family, seed)) for seed in range(4)]
    ours, side = of_ladder(family, batches, 2, monkeypatch)
    assert side.blocks[0].graphs._made
    assert_same(ours, of_ladder(family, batches, 10**9, monkeypatch)[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_under_autocast_they_err_as_those_of_eager_blocks(family, monkeypatch):
    batches = [on_gpu(examples_of(family, seed)) for seed in range(4)]
    ours, side = of_ladder(family, batches, 2, monkeypatch, autocast=True)
    assert side.blocks[0].graphs._made
    eager, exact = (of_ladder(family, batches, 10**9, monkeypatch, autocast)[0] for autocast in (True, False))
    error, allowed = (distance(found, exact) for found in (ours, eager))
    assert 0 < error <= 1.5 * allowed


def distance(found, exact):
    """||found - exact|| / ||exact|| of all gradients together."""
    off = sum((found[name] - gradient).square().sum() for name, gradient in exact.items())
    return float((off / sum(gradient.square().sum() for gradient in exact.values())).sqrt())


def test_nothing_piles_up(monkeypatch):
    monkeypatch.setattr(graphs, "_CALLS", 2)
    model, inputs = ladder("keep", "bert", 0.2).cuda(), on_gpu(examples_of("bert"))
    held = []
    for _ in range(6):
        model(**inputs).loss.backward()
        model.zero_grad()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2:] == [held[2]] * 4
