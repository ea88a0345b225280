"""Ladders where they do not belong: every refusal names the argument, what was given, what is allowed, the way out."""

import json

import pytest
import torch
from transformers import DynamicCache

import tlfast
from tests.backbone.test_generic import Plain, linears
from tests.models import (
    CONFIGS,
    DECODERS,
    ENCODER_DECODERS,
    IMAGE_ENCODERS,
    batch,
    inputs_of,
    task_of,
    tiny,
)
from tlfast import LadderConfig, LadderModel
from tlfast.ladder.tasks import CLASSIFICATION, TASKS

TEXT = ("sequence-classification", "token-classification")


def ladder(family="bert", task=None, **settings):
    config = LadderConfig(**{"reduction": 2, "init": "random", **settings})
    return LadderModel(tlfast.freeze(tiny(family)), task or task_of(family), 3, config)


def fitting(family):
    """The tasks of this kind of model."""
    if family in IMAGE_ENCODERS:
        return {"image-classification"}
    if family in ENCODER_DECODERS:
        return {"seq2seq-lm"}
    return {*TEXT, "causal-lm"} if family in DECODERS else {*TEXT}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_task_fits_or_is_refused_with_the_way_out(family):
    backbone = tlfast.freeze(tiny(family))
    for task in TASKS:
        if task in fitting(family):
            assert LadderModel(backbone, task, 3, LadderConfig(reduction=2)).task == task
            continue
        with pytest.raises(ValueError) as caught:
            LadderModel(backbone, task, 3, LadderConfig(reduction=2))
        said = str(caught.value)
        assert said.startswith(f"task: {task!r} does not fit this {backbone.model_type} backbone: ")
        assert any(word in said for word in ("pass", "use", "load")), said


@pytest.mark.parametrize(("family", "loader"), [("gpt2", "AutoModelForCausalLM"), ("llama", "AutoModelForCausalLM")])
def test_a_decoder_without_its_head_says_how_to_load_it(family, loader):
    with pytest.raises(ValueError, match=rf"it has no language-model head; load it with {loader}"):
        LadderModel(tlfast.freeze(tiny(family).base_model), "causal-lm")


def test_an_encoder_decoder_without_its_head_says_how_to_load_it():
    with pytest.raises(ValueError, match="it has no language-model head; load it with AutoModelForSeq2SeqLM"):
        LadderModel(tlfast.freeze(tiny("bart").model), "seq2seq-lm")


def test_a_causal_text_tower_writes_no_text():
    with pytest.raises(ValueError, match="'causal-lm' does not fit this clip_text_model backbone"):
        LadderModel(tlfast.freeze(tiny("clip-text")), "causal-lm")


@pytest.mark.parametrize("task", CLASSIFICATION[:2])
def test_a_decoder_classifies_by_its_last_token(task):
    model = LadderModel(tlfast.freeze(tiny("llama")), task, 3, LadderConfig(reduction=2, pooling="last")).train()
    labels = torch.tensor([0, 1, 2]) if task == "sequence-classification" else torch.randint(0, 3, (3, 12))
    model(**batch(), labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ladder("t5", layers=[3]), ["layers", "3", "blocks 0 to 2"]),
        (lambda: ladder("t5-v1.1", decoder_layers=[2]), ["decoder_layers", "2", "blocks 0 to 1"]),
        (lambda: ladder("t5-v1.1", layers=[2]), ["decoder_layers", "2", "blocks 0 to 1"]),
        (lambda: ladder("t5", decoder_layers=[-4]), ["decoder_layers", "-4"]),
        (lambda: ladder("t5", decoder_layers=[]), ["decoder_layers", "empty", '"all"']),
        (lambda: ladder("gpt2", decoder_layers=[0]), ["decoder_layers", "gpt2", "one list", "layers"]),
        (lambda: ladder("bert", decoder_layers="all"), ["decoder_layers", "bert", "one list", "layers"]),
        (lambda: LadderConfig(decoder_layers="last"), ["decoder_layers", "last", "all"]),
        (lambda: LadderConfig(decoder_layers=[1.5]), ["decoder_layers", "1.5"]),
        (lambda: ladder("llama", reduction=16), ["reduction", "16", "4 heads of 16", "allowed: 1, 2, 4, 8"]),
        (lambda: ladder("bart", reduction=16), ["reduction", "16", "allowed: 1, 2, 4, 8"]),
        (lambda: ladder("t5", reduction=5), ["reduction", "5", "3 heads of 16", "allowed: 1, 2, 4, 8, 16"]),
    ],
)
def test_settings_that_do_not_fit_the_model(make, words):
    with pytest.raises(ValueError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_layers_of_both_halves():
    model = ladder("t5", layers=[0, -1])
    assert (len(model.side_encoder.blocks), len(model.side.blocks)) == (2, 2)
    model = ladder("t5-v1.1", layers=[0, 2], decoder_layers=[-1])
    assert [stack.taps for stack in model.backbone.stacks.values()] == [(0, 2), (1,)]
    model = ladder("t5-v1.1", layers=[2], decoder_layers="all")
    assert [stack.taps for stack in model.backbone.stacks.values()] == [(2,), (0, 1)]


IDS = batch((6, 6, 6))["input_ids"]


@pytest.mark.parametrize(
    ("family", "inputs", "error", "words"),
    [
        ("gpt2", {"input_ids": IDS, "wings": 2}, TypeError, ["wings", "a ladder has no such input", "labels"]),
        ("gpt2", {"input_ids": IDS, "decoder_input_ids": IDS}, TypeError, ["decoder_input_ids", "gpt2", "leave it"]),
        ("gpt2", {"input_ids": IDS, "encoder_outputs": 1}, TypeError, ["encoder_outputs", "no encoder-decoder"]),
        ("gpt2", {"input_ids": IDS, "pixel_values": IDS}, TypeError, ["pixel_values", "gpt2", "pass input_ids"]),
        ("vit", {"input_ids": IDS}, TypeError, ["pixel_values", "missing", "vit", "images"]),
        ("bert", {"input_ids": IDS, "past_key_values": DynamicCache()}, TypeError, ["past_key_values", "leave it out"]),
        ("bert", {"input_ids": IDS, "logits_to_keep": 1}, TypeError, ["logits_to_keep", "sequence-classification"]),
        (
            "gpt2",
            {"input_ids": IDS, "labels": IDS[:, :3]},
            ValueError,
            ["labels", "(3, 3)", "pass one label", "(3, 6)"],
        ),
        ("gpt2", {"input_ids": IDS, "labels": IDS[:, 0]}, ValueError, ["labels", "(3,)", "(3, 6)"]),
        ("t5", {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS[:, :2]}, ValueError, ["labels", "(3, 2)"]),
        ("t5", {"input_ids": IDS}, ValueError, ["decoder_input_ids", "shifted right"]),
        ("bert", {"input_ids": IDS, "labels": torch.zeros(4).long()}, ValueError, ["labels", "(4,)", "(B,) classes"]),
        ("bert", {"input_ids": IDS, "labels": IDS[:, :2]}, ValueError, ["labels", "(3, 2)", "(B,) classes"]),
        ("bert", {"input_ids": IDS, "labels": torch.zeros(3, 4)}, ValueError, ["labels", "(3, 4)", "(B, num_labels)"]),
        ("vit", inputs_of("vit") | {"labels": torch.zeros(2).long()}, ValueError, ["labels", "(2,)", "(B,) classes"]),
        (
            "vit",
            inputs_of("vit") | {"attention_mask": torch.ones(3, 17)},
            ValueError,
            ["attention_mask", "leave it out"],
        ),
        (
            "gpt2",
            {"input_ids": IDS, "attention_mask": torch.ones(3, 1, 6, 6)},
            ValueError,
            ["attention_mask", "(3, 6)"],
        ),
        (
            "t5",
            {"input_ids": IDS, "decoder_input_ids": IDS, "decoder_attention_mask": torch.ones(3, 4)},
            ValueError,
            ["decoder_attention_mask", "(3, 4)", "(3, 6)"],
        ),
    ],
)
def test_inputs_that_do_not_fit(family, inputs, error, words):
    with pytest.raises(error) as caught:
        ladder(family)(**inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_labels_of_tokens_must_cover_them():
    with pytest.raises(ValueError, match=r"labels: shape \(3,\) does not fit.*one label a token, \(3, 6\)"):
        ladder(task="token-classification")(input_ids=IDS, labels=torch.zeros(3).long())


def test_use_cache_means_nothing_to_a_classifier():
    assert ladder("gpt2", "sequence-classification")(input_ids=IDS, use_cache=True).logits.shape == (3, 3)


def with_other_head(family, **settings):
    model = tiny(family, **settings)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("family", "other", "words"),
    [
        ("t5-v1.1", lambda: with_other_head("t5-v1.1"), ["(untied)", "trained on (untied)"]),
        ("llama", lambda: with_other_head("llama"), ["(untied)", "trained on (untied)"]),
        ("gemma2", lambda: tiny("gemma2", final_logit_softcapping=2.0), ["(tied)", "trained on (tied)"]),
        ("gpt2", lambda: untied(tiny("gpt2")), ["(untied)", "trained on (tied)"]),
    ],
)
def test_a_ladder_on_another_head_is_refused(family, other, words, tmp_path):
    ladder(family).save_pretrained(tmp_path)
    assert LadderModel.from_pretrained(tmp_path, tiny(family))
    with pytest.raises(ValueError) as caught:
        LadderModel.from_pretrained(tmp_path, other())
    said = str(caught.value)
    assert "language-model head" in said and said.endswith("pass that model"), said
    assert all(word in said for word in words), said


def untied(model):
    """The same model, whose head is a copy of the embedding and then its own."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_a_language_ladder_on_a_model_without_its_head_is_refused(tmp_path):
    ladder("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no language-model head; load it with AutoModelForCausalLM"):
        LadderModel.from_pretrained(tmp_path, tiny("llama").model)


def test_a_classifier_on_a_language_model_comes_back_without_its_head(tmp_path):
    model = ladder("llama", "sequence-classification").eval()
    logits = model(**batch()).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["lm_head"] is None
    for backbone in (tiny("llama").model, tiny("llama")):
        assert torch.equal(LadderModel.from_pretrained(tmp_path, backbone)(**batch()).logits, logits)


@pytest.mark.parametrize("init", ["prune", "pca", "random"])
def test_a_ladder_on_a_model_of_no_family(init, tmp_path):
    """The list of blocks, found by its length or named, is kept in the saved description."""
    inputs = {"input_ids": IDS, "labels": torch.tensor([0, 1, 2])}
    backbone = tlfast.freeze(Plain(others=linears(5)), blocks="trunk")
    model = LadderModel(backbone, num_labels=3, config=LadderConfig(reduction=2, init=init)).train()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    logits = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["blocks"] == "trunk"
    for again in (Plain(others=linears(5)), tlfast.freeze(Plain(others=linears(5)), blocks="trunk")):
        assert torch.equal(LadderModel.from_pretrained(tmp_path, again)(**inputs).logits, logits)


def test_a_model_of_no_family_fits_every_classification_and_no_text_writing():
    backbone = tlfast.freeze(Plain())
    for task in CLASSIFICATION:
        assert LadderModel(backbone, task, 3, LadderConfig(reduction=2)).task == task
    for task in ("causal-lm", "seq2seq-lm"):
        with pytest.raises(ValueError, match=f"task: '{task}' does not fit this Plain backbone"):
            LadderModel(backbone, task, 3, LadderConfig(reduction=2))
