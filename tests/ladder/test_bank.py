"""LadderBank: every ladder's logits as alone, one frozen forward, what it refuses, what it follows."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
)

import tlfast
from tests.budget import assert_within_budget
from tests.models import VOCABULARY, batch, tiny
from tlfast import LadderBank, LadderConfig, LadderModel
from tlfast.ladder.stacked import LadderStack

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=48, n_layer=3, n_head=3, n_inner=96, vocab_size=VOCABULARY, n_positions=70),
    "llama": LlamaConfig(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA),
    "gemma2": Gemma2Config(**LLAMA),
    "vit": ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
    ),
    "t5": T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_ff=96,
        d_kv=16,
        num_heads=3,
        num_layers=2,
        decoder_start_token_id=0,
    ),
}
CAUSAL = ("gpt2", "llama", "qwen3", "gemma2")


def spread(module, seed):
    """Weights as far apart as trained ones: gates, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def backbone(family="bert"):
    if family == "bert":
        return tlfast.freeze(tiny())
    loader = AutoModelForCausalLM if family in CAUSAL else AutoModelForSeq2SeqLM if family == "t5" else AutoModel
    torch.manual_seed(0)
    model = loader.from_config(copy.deepcopy(CONFIGS[family]))
    spread(model, 0)
    return tlfast.freeze(model.eval())


def ladder(frozen, seed=0, task="sequence-classification", num_labels=16, **settings):
    torch.manual_seed(seed)
    config = LadderConfig(**{"reduction": 2, "init": "random", **settings})
    model = LadderModel(frozen, task=task, num_labels=num_labels, config=config).eval()
    for part in (model.side, model.head, model.side_encoder):
        if part is not None:
            spread(part, seed)
    return model


def inputs_of(family):
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    if family == "t5":
        return batch() | {"decoder_input_ids": batch((4, 4, 4), seed=1)["input_ids"]}
    return batch()


def doubled(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@torch.no_grad()
def assert_as_alone(bank, inputs, ladders=None, **kwargs):
    """Budgets are over the logits of all ladders: those of one are too few to say how far rounding goes."""
    results, ladders = bank(**inputs, **kwargs), ladders or bank
    compared = []
    for name, result in results.items():
        alone = ladders[name](**inputs)
        exact = copy.deepcopy(ladders[name]).double()(**doubled(inputs)).logits
        assert type(result) is type(alone) and result.loss is None and result.logits.shape == exact.shape
        compared.append([logits.flatten() for logits in (result.logits, alone.logits, exact)])
    assert_within_budget(f"{list(results)}", *(torch.cat(logits) for logits in zip(*compared, strict=True)))
    return results


@pytest.fixture
def stacked(monkeypatch):
    """The sizes of the stacks that are run."""
    sizes = []
    run = LadderStack.__call__
    monkeypatch.setattr(LadderStack, "__call__", lambda s, *a: (sizes.append(len(s.ladders)), run(s, *a))[1])
    return sizes


@pytest.mark.parametrize("family", ["bert", *CONFIGS])
def test_logits_equal_each_ladder_alone(family, stacked):
    frozen = backbone(family)
    task = {"vit": "image-classification", "t5": "seq2seq-lm"}.get(family, "sequence-classification")
    ladders = {f"ladder {seed}": ladder(frozen, seed, task) for seed in range(4)}
    assert_as_alone(LadderBank(ladders, frozen), inputs_of(family))
    assert stacked == ([] if family == "t5" else [4])  # T5's blocks share a relative bias


def test_tasks_layers_reductions_gates_and_heads_side_by_side(stacked):
    frozen = backbone("gpt2")
    ladders = {
        "topic": ladder(frozen, 0, num_labels=5),
        "mood": ladder(frozen, 1, num_labels=1, pooling="last", gate="channel"),
        "words": ladder(frozen, 2, "token-classification", 7, gate_temperature=0.3),
        "text": ladder(frozen, 3, "causal-lm"),
        "plain": ladder(frozen, 4, blend=False, pooling="cls", dropout=0.2),
        "few": ladder(frozen, 5, layers=[0, 2]),
        "fewer": ladder(frozen, 6, layers=[-1]),
        "few too": ladder(frozen, 7, layers=[0, 2], blend=False),
        "narrow": ladder(frozen, 8, reduction=4),
    }
    results = assert_as_alone(LadderBank(ladders, frozen), inputs_of("gpt2"))
    assert list(results) == list(ladders)
    assert sorted(stacked) == [2, 5]


def test_words_of_one_task_only(stacked):
    frozen = backbone()
    ladders = {str(n): ladder(frozen, n, "token-classification", n) for n in (2, 3)}
    results = assert_as_alone(LadderBank(ladders, frozen), batch())
    assert [results[name].logits.shape for name in ladders] == [(3, 12, 2), (3, 12, 3)] and stacked == [2]


@pytest.mark.parametrize("position_ids", [torch.arange(3, 15)[None], torch.arange(36).view(3, 12)])
def test_rotated_positions_reach_every_ladder(position_ids, stacked):
    frozen = backbone("llama")
    bank = LadderBank({str(seed): ladder(frozen, seed) for seed in range(2)}, frozen)
    assert_as_alone(bank, batch() | {"position_ids": position_ids})
    assert stacked == [2]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_large_batch_is_taken_in_parts(monkeypatch, stacked, rows):
    monkeypatch.setattr("tlfast.ladder.stacked_sides._STATE_ELEMENTS", rows * 3 * 12 * 24)  # of three ladders
    positions = {"bert": None, "llama": torch.arange(36).view(3, 12), "gpt2": torch.arange(12)[None]}
    for family, position_ids in positions.items():
        frozen = backbone(family)
        bank = LadderBank({str(seed): ladder(frozen, seed) for seed in range(3)}, frozen)
        assert_as_alone(bank, batch() | ({} if position_ids is None else {"position_ids": position_ids}))
    assert_as_alone(bank, {"input_ids": batch()["input_ids"]})
    assert stacked == [3] * 4


def test_no_mask_a_masked_row_one_token_and_an_empty_batch():
    frozen = backbone()
    bank = LadderBank({str(seed): ladder(frozen, seed) for seed in range(3)}, frozen)
    assert_as_alone(bank, {"input_ids": batch()["input_ids"]})
    assert_as_alone(bank, {"input_ids": torch.tensor([[5]])})
    inputs = batch((6, 2))
    inputs["attention_mask"][0] = 0
    assert_as_alone(bank, inputs)
    empty = torch.zeros(0, 4, dtype=torch.long)
    assert bank(input_ids=empty, attention_mask=empty)["1"].logits.shape == (0, 16)


def test_the_backbone_runs_once_at_the_union_of_the_layers():
    frozen = backbone()
    runs = []
    frozen.model.register_forward_hook(lambda *_: runs.append(1))
    bank = LadderBank({"a": ladder(frozen, 0, layers=[0]), "b": ladder(frozen, 1, layers=[2])}, frozen)
    bank(**batch())
    assert bank.backbone.tap_indices == (0, 2) and len(runs) == 1
    bank.remove("a")
    assert bank.backbone.tap_indices == (2,)


def test_names_choose_and_stacks_of_a_few_choices_are_kept(stacked):
    frozen = backbone()
    bank = LadderBank({str(seed): ladder(frozen, seed) for seed in range(4)}, frozen)
    assert list(assert_as_alone(bank, batch(), names=["3", "1"])) == ["3", "1"]
    assert list(assert_as_alone(bank, batch(), names=["2"])) == ["2"]
    assert stacked == [2]
    for first in "0123":
        for second in "0123":
            if first != second:
                bank(names=[first, second], **batch())
    assert len(bank._stacks) == 8


def test_it_is_a_mapping_that_ladders_join_and_leave():
    frozen = backbone()
    first, second = ladder(frozen, 0), ladder(frozen, 1)
    bank = LadderBank({"first": first}, frozen)
    bank.add("second", second)
    assert len(bank) == 2 and "second" in bank and list(bank) == ["first", "second"] and bank["second"] is second
    assert "'first': sequence-classification" in repr(bank)
    before = bank(**batch())
    assert bank.remove("first") is first and "first" not in bank
    bank.add("first", ladder(frozen, 2))
    after = assert_as_alone(bank, batch())
    assert not torch.equal(before["first"].logits, after["first"].logits)


def test_a_transformers_model_is_frozen_and_saved_ladders_are_loaded(tmp_path):
    ladders = {name: ladder(backbone(), seed) for seed, name in enumerate(("one", "two"))}
    for name, model in ladders.items():
        model.save_pretrained(tmp_path / name)
    model = tiny()
    bank = LadderBank({"one": str(tmp_path / "one"), "two": tmp_path / "two", "other": ladders["one"]}, model)
    assert bank["one"].backbone.model is model and not any(p.requires_grad for p in model.parameters())
    assert_as_alone(bank, batch(), ladders | {"other": ladders["one"]})


def test_weights_changed_in_place_are_followed():
    frozen = backbone()
    bank = LadderBank({str(seed): ladder(frozen, seed) for seed in range(3)}, frozen)
    before = bank(**batch())
    stack = next(iter(bank._stacks.values()))
    bank(**batch())
    assert next(iter(bank._stacks.values())) is stack
    model, inputs = bank["1"].train(), batch(labels=16)
    model(**inputs).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()
    after = assert_as_alone(bank, batch())
    assert not torch.equal(before["1"].logits, after["1"].logits)
    assert torch.equal(before["2"].logits, after["2"].logits)
    bank["1"].load_state_dict(bank["2"].state_dict())
    assert torch.equal(bank(**batch())["1"].logits, after["2"].logits)
    for model in bank.values():
        model.double()
    assert bank(**batch())["1"].logits.dtype == torch.float64


def test_nothing_drops_out_and_no_graph_is_built_in_any_mode():
    frozen = backbone()
    bank = LadderBank({"a": ladder(frozen, dropout=0.5), "b": ladder(frozen, layers=[0], dropout=0.5)}, frozen)
    bank.add("c", ladder(frozen, 1, dropout=0.5))
    expected = bank(**batch())
    for model in bank.values():
        model.train()
    state = torch.get_rng_state()
    for name, result in bank(**batch()).items():
        assert torch.equal(result.logits, expected[name].logits) and not result.logits.requires_grad
        assert bank[name].training
    assert torch.equal(torch.get_rng_state(), state)


def test_under_autocast_and_inference_mode(stacked):
    frozen = backbone()
    bank = LadderBank({str(seed): ladder(frozen, seed) for seed in range(2)}, frozen)
    with torch.autocast("cpu", torch.bfloat16):
        result = bank(**batch())
        with torch.no_grad():
            assert torch.equal(result["1"].logits, bank["1"](**batch()).logits)
    assert stacked == []
    with torch.inference_mode():
        inside = bank(**batch())["1"].logits
    assert torch.equal(inside, bank(**batch())["1"].logits) and stacked == [2, 2]


def test_making_a_bank_draws_no_random_numbers():
    frozen = backbone()
    ladders = {str(seed): ladder(frozen, seed) for seed in range(2)}
    state = torch.get_rng_state()
    LadderBank(ladders, frozen)(**batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_is_the_ladders_own():
    frozen = backbone("gpt2")
    bank = LadderBank({str(seed): ladder(frozen, seed, "causal-lm") for seed in range(2)}, frozen)
    assert_as_alone(bank, batch())
    ids = batch((6,))["input_ids"]
    assert bank["1"].generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1).shape == (1, 9)


def lazy(frozen):
    return LadderModel(frozen, num_labels=3, config=LadderConfig(reduction=2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda f, b: LadderBank({}, f), ValueError, ["ladders", "none", "at least one"]),
        (lambda f, b: LadderBank([b["a"]], f), TypeError, ["ladders", "list", "{name"]),
        (lambda f, b: LadderBank({"a": f}, f), TypeError, ["'a'", "FrozenBackbone", "LadderModel"]),
        (lambda f, b: LadderBank({1: b["a"]}, f), TypeError, ["name", "1", "string"]),
        (lambda f, b: LadderBank({"a": b["a"]}, "bert"), TypeError, ["model", "str"]),
        (lambda f, b: LadderBank({"x": b["a"]}, tlfast.freeze(tiny(seed=1))), ValueError, ["'x'", "another backbone"]),
        (
            lambda f, b: LadderBank({"x": b["a"]}, tlfast.freeze(tiny(), "bf16")),
            ValueError,
            ["in fp32", "on bf16"],
        ),
        (lambda f, b: LadderBank({"a": "/nowhere"}, f), ValueError, ["'a'", "/nowhere", "no saved ladder"]),
        (lambda f, b: LadderBank({"new": lazy(f)}, f), ValueError, ["'new'", "no batch", "train or load"]),
        (lambda f, b: b.add("a", b["a"]), ValueError, ["'a'", "already", "remove"]),
        (lambda f, b: b.remove("z"), ValueError, ["'z'", "'a', 'b'"]),
        (lambda f, b: b["z"], KeyError, ["z"]),
        (lambda f, b: b(names=["z"], **batch()), ValueError, ["names", "'z'", "'a', 'b'"]),
        (lambda f, b: b(names=["a", "a"], **batch()), ValueError, ["names", "twice"]),
        (lambda f, b: b(names=[], **batch()), ValueError, ["names", "no ladder"]),
        (lambda f, b: b(names="a", **batch()), TypeError, ["names", "'a'", "list"]),
        (lambda f, b: b(**batch(labels=3)), TypeError, ["labels", "bank[name]"]),
        (lambda f, b: b(**batch(), wings=1), TypeError, ["wings", "input_ids"]),
    ],
)
def test_misuse_is_a_clear_error(make, error, words):
    frozen = backbone()
    bank = LadderBank({"a": ladder(frozen, 0), "b": ladder(frozen, 1)}, frozen)
    with pytest.raises(error) as caught:
        make(frozen, bank)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_saved_ladder_whose_task_the_backbone_lacks_is_named(tmp_path):
    ladder(backbone("gpt2"), task="causal-lm").save_pretrained(tmp_path)
    headless = backbone("gpt2").base
    with pytest.raises(ValueError, match=r"ladder 'text': task: 'causal-lm' does not fit .* no language-model head"):
        LadderBank({"text": tmp_path}, headless)


def test_an_encoder_decoder_needs_the_targets_tokens():
    frozen = backbone("t5")
    bank = LadderBank({"a": ladder(frozen, 0, "seq2seq-lm", layers=[0]), "b": ladder(frozen, 1, "seq2seq-lm")}, frozen)
    assert_as_alone(bank, inputs_of("t5"))
    with pytest.raises(ValueError, match="decoder_input_ids"):
        bank(**batch())
