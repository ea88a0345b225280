"""Tap storages on a GPU: gradients, and what stays in its memory."""

from __future__ import annotations

import pytest
import torch

import tlfast
from tests.ladder.test_tap_storage import assert_same, gradients, ladder
from tests.models import examples_of
from tlfast import LadderConfig, LadderModel

pytestmark = pytest.mark.gpu


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("storage", ["offload", "stream"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_gradients_are_those_of_keep(family, storage):
    batches = [on_gpu(examples_of(family, seed)) for seed in range(2)]
    ours, theirs = (gradients(ladder(kind, family, 0.2).cuda(), *batches) for kind in (storage, "keep"))
    assert_same(ours, theirs, tolerance=1e-4)


@pytest.mark.parametrize("storage", ["int8", "project"])
def test_gradients_are_finite(storage):
    found = gradients(ladder(storage, dropout=0.2).cuda(), on_gpu(examples_of("bert")))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found.values())


def test_offloaded_taps_leave_the_gpu():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 3072}
    kept = {}
    for storage in ("keep", "offload"):
        torch.manual_seed(0)
        backbone = tlfast.freeze(BertModel(BertConfig(**sizes, vocab_size=100)))
        config = LadderConfig(reduction=8, init="random", tap_storage=storage)
        model = LadderModel(backbone, config=config).train().cuda()
        inputs = {"input_ids": torch.randint(0, 100, (8, 256), device="cuda"), "labels": torch.zeros(8).long().cuda()}
        model(**inputs).loss.backward()
        before = torch.cuda.memory_allocated()
        loss = model(**inputs).loss
        torch.cuda.synchronize()
        kept[storage] = torch.cuda.memory_allocated() - before
        del loss
    taps = 7 * 8 * 256 * 768 * 4
    assert kept["keep"] - kept["offload"] >= 0.9 * taps
