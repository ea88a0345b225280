"""generate(): transformers' own loop over the ladder; caching, padding and beams change no token."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

import tlfast
from tests.models import DECODERS, ENCODER_DECODERS, PAD, VOCABULARY, digest, inputs_of, task_of, tiny
from tlfast import LadderConfig, LadderModel

LANGUAGE_MODELS = DECODERS | ENCODER_DECODERS
NEW = 6
MODES = {
    "greedy": {},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@functools.cache
def ladder(family, moved=True, **settings):
    """A ladder whose weights were moved, so that it speaks otherwise than its backbone."""
    backbone = tlfast.freeze(tiny(family, **settings))
    torch.manual_seed(0)
    model = LadderModel(backbone, task_of(family), config=LadderConfig(reduction=2, init="random")).eval()
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def prompts(family):
    """Four prompts of unlike lengths, padded where transformers pads for this kind of model."""
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9)[None] >= torch.tensor([0, 4, 7, 2])[:, None]
    if family in ENCODER_DECODERS:
        ids, mask = ids.flip(1), mask.flip(1)
    return {"input_ids": ids.where(mask, torch.tensor(PAD)), "attention_mask": mask.long()}


def generate(model, inputs, **settings):
    torch.manual_seed(5)
    exactly = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(**inputs, **{"do_sample": False, **exactly, **settings})


def continuation(family, tokens, prompt_length):
    return tokens[:, 1 if family in ENCODER_DECODERS else prompt_length :]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_the_cache_changes_no_token(family, mode):
    model, inputs = ladder(family), prompts(family)
    cached, uncached = (generate(model, inputs, use_cache=use, **MODES[mode]) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert cached.shape[0] == 4 * MODES[mode].get("num_return_sequences", 1)
    assert continuation(family, cached, 9).shape[1] == NEW
    bare = generate(model.backbone.model, inputs, **MODES[mode])
    assert not torch.equal(cached, bare), "the ladder must have its say"


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_padded_row_generates_what_it_does_alone(family):
    model, inputs = ladder(family), prompts(family)
    together = continuation(family, generate(model, inputs), 9)
    for row in range(4):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        alone = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert torch.equal(continuation(family, alone, ids.shape[1])[0], together[row])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt-projected", "t5", "bart"])
def test_a_new_ladder_generates_what_its_backbone_does(family, mode):
    model, inputs = ladder(family, moved=False), prompts(family)
    assert torch.equal(
        generate(model, inputs, **MODES[mode]), generate(copy.deepcopy(model.backbone.model), inputs, **MODES[mode])
    )


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # the name that every version takes
@pytest.mark.parametrize("family", DECODERS)
def test_generation_continues_from_a_cache(family):
    """As in transformers: a conversation's cache is passed back, with the longer prompt."""
    model, inputs = ladder(family), prompts(family)
    first = generate(model, inputs, past_key_values=DynamicCache(), return_dict_in_generate=True)
    more = torch.randint(3, VOCABULARY, (4, 3), generator=torch.Generator().manual_seed(4))
    ids = torch.cat((first.sequences, more), dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 9), value=1)
    longer = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(generate(model, longer, past_key_values=first.past_key_values), generate(model, longer))


@pytest.mark.parametrize("family", DECODERS)
def test_forward_with_a_cache_gives_the_logits_of_the_whole(family):
    model = ladder(family)
    ids = prompts(family)["input_ids"][:1].repeat(2, 1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        result = model(input_ids=ids[:, :4], use_cache=True)
        parts, cache = [result.logits], result.past_key_values
        for start, end in ((4, 5), (5, 9)):
            mask = torch.ones(2, end, dtype=torch.long)
            parts.append(model(input_ids=ids[:, start:end], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_decoder_with_a_cache_gives_the_logits_of_the_whole(family):
    model, inputs = ladder(family), inputs_of(family)
    target = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=target).logits
        first = model(**inputs, decoder_input_ids=target[:, :4], use_cache=True)
        rest = model(**inputs, decoder_input_ids=target[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, rest.logits), dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_encoder_runs_once_for_all_steps(family, monkeypatch):
    model, lengths = ladder(family), []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda **inputs: lengths.append(inputs["input_ids"].shape) or encode(**inputs))
    generate(model, prompts(family), num_beams=3)
    assert lengths == [(4, 9)]


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_windows_shorter_than_the_text(family, mode):
    model, inputs = ladder(family, sliding_window=4), prompts(family)
    cached, uncached = (generate(model, inputs, use_cache=use, **MODES[mode]) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, generate(ladder(family), inputs, **MODES[mode])), "the window must show"


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "t5", "t5-v1.1", "bart"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_static_cache_changes_no_token(family, mode, padded):
    model, inputs = ladder(family), prompts(family)
    if not padded:
        ids = inputs["input_ids"][:1]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    static = generate(model, inputs, cache_implementation="static", **MODES[mode])
    assert torch.equal(static, generate(model, inputs, **MODES[mode]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_drafts_that_are_taken_back_change_no_token(family):
    """Looking drafts up in the prompt crops the cache: the side network's part of it must be cropped too."""
    model = ladder(family)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    looked_up = generate(model, inputs, prompt_lookup_num_tokens=3, max_new_tokens=12, min_new_tokens=12)
    assert torch.equal(looked_up, generate(model, inputs, max_new_tokens=12, min_new_tokens=12))


def test_prompts_may_be_embeddings():
    model, ids = ladder("gpt2"), prompts("gpt2")["input_ids"][:1]
    embeddings = model.backbone.model.get_input_embeddings()(ids)
    assert torch.equal(
        generate(model, {"inputs_embeds": embeddings}), generate(model, {"input_ids": ids})[:, ids.shape[1] :]
    )


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_the_backbones_settings_for_generation_are_used(family):
    model, inputs = ladder(family), prompts(family)
    settings = copy.deepcopy(model.backbone.model.generation_config)
    try:
        model.backbone.model.generation_config.update(max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
        found = model.generate(**inputs)
    finally:
        model.backbone.model.generation_config = settings
    assert torch.equal(found, generate(model, inputs, num_beams=2, max_new_tokens=4, min_new_tokens=4))


def test_a_stop_token_ends_a_row_and_pads_it():
    model, inputs = ladder("llama"), prompts("llama")
    tokens = generate(model, inputs)
    stop = int(tokens[0, 10])
    stopped = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop)
    row = stopped[0, 9:].tolist()
    assert stop in row and set(row[row.index(stop) + 1 :]) <= {PAD}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_logits_to_keep(family):
    model, inputs = ladder(family), inputs_of(family)
    with torch.no_grad():
        whole = model(**inputs).logits
        last, chosen = (model(**inputs, logits_to_keep=keep).logits for keep in (2, torch.tensor([0, 3])))
    torch.testing.assert_close(last, whole[:, -2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chosen, whole[:, [0, 3]], rtol=1e-5, atol=1e-5)


def test_generation_changes_nothing_of_model_and_backbone():
    model = ladder("t5")
    before, own = digest(model), type(model.backbone.model)
    names = set(vars(model.backbone.model))
    generate(model, prompts("t5"), num_beams=2)
    assert digest(model) == before and type(model.backbone.model) is own
    assert set(vars(model.backbone.model)) == names
    assert not any(module._forward_hooks for module in model.backbone.model.modules())


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # the name that every version takes
def test_a_cache_that_the_backbone_filled_is_refused():
    model, ids = ladder("gpt2"), prompts("gpt2")["input_ids"]
    cache = DynamicCache()
    model.backbone.model(input_ids=ids[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values: it holds 5 positions of the backbone.*pass an empty cache"):
        model(input_ids=ids[:, 5:], past_key_values=cache)


def test_an_encoders_output_without_the_side_encoders_is_refused():
    model, inputs = ladder("t5"), prompts("t5")
    outputs = model.backbone.model.get_encoder()(**inputs)
    with pytest.raises(ValueError, match=r"encoder_outputs: they hold no side_hidden_state.*pass input_ids"):
        model.generate(encoder_outputs=outputs, attention_mask=inputs["attention_mask"], max_new_tokens=2)


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification"])
def test_a_classifier_does_not_generate(task):
    model = LadderModel(tlfast.freeze(tiny("gpt2")), task, 3, LadderConfig(reduction=2))
    with pytest.raises(ValueError, match=rf"generate: a ladder for '{task}' does not generate.*'causal-lm'"):
        model.generate(**prompts("gpt2"))
