"""Vectors of batches against what transformers' own hidden states give, example by example."""

import pytest

pytest.importorskip("transformers")

import torch

from tests.budget import assert_within_budget
from tests.models import ENCODER_DECODERS, batch, inputs_of, tiny
from tlfast import freeze
from tlfast.features import Extractor, default_pooling, pool_packed

TEXTS = ("bert", "roberta", "distilbert", "modernbert", "t5-encoder", "gpt2", "llama", "qwen3", "opt-projected")


def pooled(hidden, pooling):
    """(S, D) without padding -> (D,)"""
    return {"mean": hidden.mean(dim=0), "cls": hidden[0], "last": hidden[-1]}[pooling]


def alone(family, model, inputs, layer, pooling):
    """Each example by itself, without padding: hidden states as transformers gives them, then pooled."""
    module = model.get_encoder() if family in ENCODER_DECODERS else getattr(model, "base_model", model)
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        with torch.no_grad():
            output = module(input_ids=ids[mask][None], output_hidden_states=True)
        hidden = output.last_hidden_state if layer is None else output.hidden_states[layer + 1]
        rows.append(pooled(hidden[0], pooling))
    return torch.stack(rows)


def check(ours, family, inputs, layer=None, pooling="mean"):
    """Against transformers in float32, both beside float64."""
    plain = alone(family, tiny(family), inputs, layer, pooling)
    exact = alone(family, tiny(family).double(), inputs, layer, pooling)
    assert_within_budget(family, ours, plain, exact)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("family", [*TEXTS, *ENCODER_DECODERS])
def test_vectors_are_the_pooled_hidden_states_of_each_text_alone(family, pooling):
    inputs = batch()
    extractor = Extractor.of(freeze(tiny(family)), pooling)
    ours = extractor(inputs)
    assert ours.shape == (3, extractor.width)
    check(ours, family, inputs, pooling=pooling)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_layer_is_that_blocks_output(family):
    inputs, frozen = batch(), freeze(tiny(family))
    ours, last = Extractor.of(frozen, "mean", layer=1), Extractor.of(frozen, "mean", layer=-2)
    assert ours.layer == last.layer == 1
    assert torch.equal(ours(inputs), last(inputs))
    check(ours(inputs), family, inputs, layer=1)


def test_normalized_vectors_have_length_one_and_the_same_direction():
    frozen, inputs = freeze(tiny()), batch()
    plain, unit = Extractor.of(frozen)(inputs), Extractor.of(frozen, normalize=True)(inputs)
    lengths = plain.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit * lengths, plain)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        *[(family, "mean") for family in ("bert", "t5", "t5-encoder", "bart", "siglip-vision")],
        *[(family, "last") for family in ("gpt2", "llama", "clip-text")],
        *[(family, "cls") for family in ("vit", "dinov2", "clip-vision")],
    ],
)
def test_what_a_family_is_pooled_by(family, pooling):
    assert default_pooling(freeze(tiny(family))) == pooling


def test_images():
    pixels, ours = inputs_of("vit")["pixel_values"], Extractor.of(freeze(tiny("vit")))(inputs_of("vit"))
    with torch.no_grad():
        plain = tiny("vit")(pixels).last_hidden_state[:, 0]
        exact = tiny("vit").double()(pixels.double()).last_hidden_state[:, 0]
    assert_within_budget("vit", ours, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sequences_without_tokens_are_zeros_and_sums_are_float32(pooling, dtype):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    bounds = torch.tensor([0, 0, 3, 3, 7, 7], dtype=torch.int32)
    ours = pool_packed(x, bounds, pooling)
    assert ours.dtype == torch.float32
    assert not ours[[0, 2, 4]].any()
    torch.testing.assert_close(ours[1], pooled(x[:3].float(), pooling))
    torch.testing.assert_close(ours[3], pooled(x[3:].float(), pooling))
    assert pool_packed(x[:0], bounds[:1], pooling).shape == (0, 5)


def test_a_pooling_or_a_block_that_is_not_there():
    frozen = freeze(tiny())
    with pytest.raises(ValueError, match="pooling: 'max' is not available; allowed: 'mean', 'cls', 'last'"):
        Extractor.of(frozen, "max")
    with pytest.raises(ValueError, match="layer: 3 is not a block; the model has blocks 0 to 2"):
        Extractor.of(frozen, layer=3)
