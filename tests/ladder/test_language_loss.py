"""The loss of a language model's frozen head without its logits: the same loss, the same gradients, less kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

import tlfast
from tests.models import examples_of, task_of, tiny

FAMILIES = ("gpt2", "gemma2", "t5", "t5-v1.1", "bart")  # plain, capped, scaled by its width, untied, with a bias


def ladder(family, precision="fp32"):
    backbone = tlfast.freeze(tiny(family), precision)
    config = tlfast.LadderConfig(reduction=1 if family == "t5-v1.1" else 2, init="random", dropout=0.0)
    model = tlfast.LadderModel(backbone, task=task_of(family), config=config).train()
    torch.nn.init.normal_(model.head.up.weight, std=0.1)  # starts at zero, and nothing would come through
    return model


def plain_loss(model, result, labels, num_items=None):
    """From the logits, as transformers computes it."""
    logits = result.logits
    if model.task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if num_items is None else num_items)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_logits(family):
    model, inputs = ladder(family), examples_of(family)
    for more in ({}, {"num_items_in_batch": 5}):
        ours = model(**inputs, **more).loss
        plain = plain_loss(model, model(**inputs), inputs["labels"], *more.values())
        torch.testing.assert_close(ours, plain)
        expected = gradients(model, plain)
        for name, gradient in gradients(model, ours).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_logits_are_there_for_whoever_reads_them(family, monkeypatch):
    model, inputs = ladder(family), examples_of(family)
    made = []
    own = model._logits
    monkeypatch.setattr(model, "_logits", lambda *states: made.append(1) or own(*states))
    result = model(**inputs, use_cache=True)
    cache = "cache" if "cache" in result else "past_key_values"  # as this transformers calls it
    assert isinstance(result, ModelOutput) and set(result) == {"loss", cache} and not made
    result[0].backward()
    assert not made
    assert result["logits"] is result.logits is result[1] and len(made) == 1
    assert list(result) == ["loss", "logits", cache] and len(result.to_tuple()) == 3
    with torch.no_grad():
        expected = model.eval()(**inputs)
    assert "logits" in expected and len(made) == 2
    # behind a text's last token logits are without meaning, and with a cache they are others
    tokens = inputs["attention_mask"].bool() if family == "gpt2" else slice(None)
    torch.testing.assert_close(result.logits[tokens], expected.logits[tokens])
    torch.testing.assert_close(result.loss, expected.loss)


def test_without_labels_logits_are_all_there_is():
    model, inputs = ladder("gpt2"), examples_of("gpt2")
    assert list(model(input_ids=inputs["input_ids"])) == ["logits"]


def test_a_backbone_in_fewer_bits():
    model, inputs = ladder("gpt2", "int8"), examples_of("gpt2")
    result = model(**inputs)
    torch.testing.assert_close(result.loss, plain_loss(model, result, inputs["labels"]))


def test_labels_of_another_shape_are_refused():
    model, inputs = ladder("gpt2"), examples_of("gpt2")
    with pytest.raises(ValueError, match=r"labels: shape \(3, 11\) does not fit 3 sequences of 12 tokens"):
        model(**inputs | {"labels": inputs["labels"][:, 1:]})


def test_a_classifier_has_its_logits_in_training_too():
    config = tlfast.LadderConfig(reduction=2, init="random")
    model = tlfast.LadderModel(tlfast.freeze(tiny()), num_labels=3, config=config).train()
    assert model(**examples_of("bert")).logits.shape == (3, 3)
