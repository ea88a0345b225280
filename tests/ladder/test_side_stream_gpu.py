"""A side network on a stream of its own gives what it gives on the backbone's."""

from __future__ import annotations

import pytest
import torch

from tests.ladder.test_tap_storage import assert_same, gradients, ladder
from tests.ladder.test_tap_storage_gpu import on_gpu
from tests.models import examples_of
from tlfast.ladder import side_stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_gradients_are_those_of_one_stream(family, monkeypatch):
    batches = [on_gpu(examples_of(family, seed)) for seed in range(4)]
    ours = gradients(ladder("keep", family, 0.2).cuda(), *batches)
    monkeypatch.setattr(side_stream, "_stream", lambda device: torch.cuda.current_stream(device))
    assert_same(ours, gradients(ladder("keep", family, 0.2).cuda(), *batches))


def test_the_rungs_have_a_stream_of_their_own():
    model, inputs = ladder("keep").cuda(), on_gpu(examples_of("bert"))
    used = []
    model.side.rungs[0].register_forward_hook(lambda *_: used.append(torch.cuda.current_stream()))
    model(**inputs)
    assert used[0] != torch.cuda.current_stream()
