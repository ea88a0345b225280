"""Fingerprints: equal for the same model, different for whatever changes taps or logits."""

import pytest
import torch

import tlfast
from tests.models import CONFIGS, DECODERS, ENCODER_DECODERS, inputs_of, tiny
from tlfast.backbone.lm_head import LMHead

LANGUAGE_MODELS = DECODERS | ENCODER_DECODERS


def last(backbone, family):
    output = backbone(**inputs_of(family))
    return (output.decoder if backbone.is_encoder_decoder else output).last_hidden_state


@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_model_has_the_same_fingerprint_and_another_has_not(family):
    first, again, other = (tlfast.freeze(tiny(family, seed)) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 50.0}),
        ("mistral", "sliding_window", 4),
        ("gemma2", "sliding_window", 3),
        ("gemma2", "layer_types", ["full_attention"] * 3),
        ("gemma2", "attn_logit_softcapping", 1.0),
        ("gemma2", "query_pre_attn_scalar", 40),
        ("modernbert", "local_attention", 4),
        ("bart", "scale_embedding", True),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("deberta-v2", "pos_att_type", ["c2p"]),
        ("bert", "hidden_act", "relu"),
        ("t5", "relative_attention_max_distance", 9),
    ],
)
def test_settings_that_change_taps_change_the_fingerprint(family, setting, value):
    settings = {setting: value, **({"sliding_window": 4} if setting == "layer_types" else {})}
    usual = {"sliding_window": 4} if setting == "layer_types" else {}
    one, other = tlfast.freeze(tiny(family, **usual)), tlfast.freeze(tiny(family, **settings))
    assert not torch.equal(last(one, family), last(other, family)), "the setting must matter"
    assert one.fingerprint() != other.fingerprint()


def test_settings_that_change_nothing_do_not():
    other = tiny("gpt2", pad_token_id=7, use_cache=False, name_or_path="elsewhere")
    assert tlfast.freeze(other).fingerprint() == tlfast.freeze(tiny("gpt2")).fingerprint()


def test_a_frozen_models_weights_and_not_its_head_make_the_fingerprint():
    whole, base = tlfast.freeze(tiny("llama")), tlfast.freeze(tiny("llama").model)
    assert whole.fingerprint() == base.fingerprint()
    assert base.lm_head is None and whole.lm_head is not None


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_heads_fingerprint_says_whether_it_is_tied(family):
    head = tlfast.freeze(tiny(family)).lm_head
    assert head.fingerprint() == tlfast.freeze(tiny(family)).lm_head.fingerprint()
    tied = family not in ("llama", "mistral", "qwen2", "qwen3", "t5-v1.1")
    assert head.tied is tied and head.fingerprint().startswith("tied:" if tied else "untied:")


def changed_bias(model):
    model.final_logits_bias[0, 3] += 1


def changed_head(model):
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1


@pytest.mark.parametrize(
    ("family", "settings", "change"),
    [
        ("gemma2", {"final_logit_softcapping": 1.5}, None),
        ("bart", {}, changed_bias),
        ("llama", {}, changed_head),
        ("t5-v1.1", {}, changed_head),
        ("t5", {"scale_decoder_outputs": False}, None),
        ("llama", {"tie_word_embeddings": True}, None),
    ],
)
def test_what_changes_a_models_logits_changes_its_heads_fingerprint(family, settings, change):
    one, other = tiny(family), tiny(family, **settings)
    if change is not None:
        change(other)
    hidden = torch.randn(2, 48, generator=torch.Generator().manual_seed(0)) * 5
    heads = [LMHead.of(model) for model in (one, other)]
    assert not torch.equal(*(head(hidden) for head in heads))
    assert heads[0].fingerprint() != heads[1].fingerprint()


def test_a_configuration_that_contradicts_the_weights_is_refused():
    model = tiny("llama")
    model.config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True.*are not the embedding's.*or set it to False"):
        _ = tlfast.freeze(model).lm_head
    model = tiny("gpt2")
    model.config.tie_word_embeddings = False
    with pytest.raises(ValueError, match=r"tie_word_embeddings is False.*are the embedding's.*or set it to True"):
        _ = tlfast.freeze(model).lm_head


def test_a_t5_whose_configuration_is_forced_to_say_tied_is_taken(tmp_path):
    """transformers 5 says tied of T5 1.1 and FLAN-T5, whose heads are their own."""
    tiny("t5-v1.1").save_pretrained(tmp_path)
    model = type(tiny("t5-v1.1")).from_pretrained(tmp_path)
    head = tlfast.freeze(model).lm_head
    assert not head.tied and head.scale == 1.0
    inputs = inputs_of("t5-v1.1")
    output = tlfast.freeze(model)(**inputs)
    with torch.no_grad():
        assert torch.equal(head(output.decoder.last_hidden_state), tiny("t5-v1.1")(**inputs).logits)
