"""A side block that computes itself once more in its backward pass has the gradients of one that keeps everything."""

import pytest
import torch

import tlfast
from tests.models import CONFIGS, DECODERS, ENCODER_DECODERS, examples_of, task_of, tiny
from tlfast import LadderConfig, LadderModel
from tlfast.ladder import blocks


def gradients(family, dropout, passes=1):
    torch.manual_seed(0)
    config = LadderConfig(reduction=2, init="random", dropout=dropout)
    model = LadderModel(tlfast.freeze(tiny(family)), task_of(family), 3, config).train()
    torch.manual_seed(1)
    with torch.no_grad():  # a language head starts at zero, and would let no gradient through
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    for _ in range(passes):
        model(**examples_of(family)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def keep_everything(monkeypatch):
    monkeypatch.setattr(blocks, "checkpoint", lambda function, *arguments, **_settings: function(*arguments))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_those_of_keeping_everything(family, dropout, monkeypatch):
    ours = gradients(family, dropout)
    keep_everything(monkeypatch)
    theirs = gradients(family, dropout)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_dropout_is_drawn_anew_in_every_forward(family):
    """The sum of two steps' gradients is not twice the first: recomputing leaves the generator where it was."""
    once, twice = gradients(family, 0.3), gradients(family, 0.3, passes=2)
    name = next(name for name in once if "feed_forward.up.weight" in name)
    assert not torch.allclose(twice[name], 2 * once[name], rtol=1e-2)


def test_recomputing_draws_no_random_number():
    torch.manual_seed(0)
    config = LadderConfig(reduction=2, init="random", dropout=0.3)
    model = LadderModel(tlfast.freeze(tiny()), config=config).train()
    loss = model(**examples_of("bert") | {"labels": torch.tensor([0, 1, 0])}).loss
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_a_cache_is_filled_once(family):
    """With a cache nothing is computed twice, even where a gradient is taken: it would grow in the backward pass."""
    torch.manual_seed(0)
    model = LadderModel(tlfast.freeze(tiny(family)), task_of(family), config=LadderConfig(reduction=2, init="random"))
    inputs = examples_of(family)
    result = model.eval()(**inputs, use_cache=True)
    length = result.past_key_values.get_seq_length()
    result.loss.backward()
    layers = getattr(result.past_key_values, "self_attention_cache", result.past_key_values).layers
    assert {layer.get_seq_length() for layer in layers if layer.get_seq_length()} == {length}
