"""Multiple choice: of a language model by the probability of each answer, of an encoder by a head."""

import copy

import pytest
import torch
import transformers as hf

from tests.models import tiny
from tests.offsite.tuning import trainable, tune
from tlfast.data import InputError
from tlfast.offsite import BlockMap, Method, TaskSpec, make, plug, save_adapter, tunable
from tlfast.offsite.choices import choose
from tlfast.offsite.tasks import head_parameters, with_head

SPEC = TaskSpec("multiple-choice", pad_token_id=1)
FAMILIES = ("gpt2", "opt", "llama", "bert", "roberta", "distilbert")
LANGUAGE = FAMILIES[:3]
SIZES = ((3, 2), (2, 4), (4, 1))  # tokens of the questions, and of the two answers


def batch_of(seed=0):
    """Three questions with two answers each, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(SIZES), 2, 8)
    ids, answers, mask = torch.ones(shape, dtype=torch.int64), *(torch.zeros(shape, dtype=torch.int64),) * 2
    answers, mask = answers.clone(), mask.clone()
    for b, (question, answer) in enumerate(SIZES):
        for c, length in enumerate((answer, answer + 1)):
            end = question + length
            ids[b, c, :end] = torch.randint(2, 97, (end,), generator=generator)
            mask[b, c, :end], answers[b, c, question:end] = 1, 1
    labels = torch.tensor([1, 0, 1]).roll(seed)
    return {"input_ids": ids, "attention_mask": mask, "answers": answers, "labels": labels}


@pytest.mark.parametrize("family", LANGUAGE)
def test_an_answer_is_as_likely_as_its_tokens_one_by_one(family):
    model, batch = tiny(family), batch_of()
    with torch.no_grad():
        logits = choose(model, batch["input_ids"], batch["attention_mask"], batch["answers"])
        for b, (question, answer) in enumerate(SIZES):
            for c, length in enumerate((answer, answer + 1)):
                ids = batch["input_ids"][b, c, : question + length]
                logs = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                expected = sum(logs[i - 1, ids[i]] for i in range(question, question + length))
                assert logits[b, c].item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_answers():
    batch = batch_of()
    made = tunable(tiny("gpt2"), _blocks(), SPEC, Method()).eval()
    output = made(**batch)
    expected = torch.nn.functional.cross_entropy(output.logits, batch["labels"])
    assert output.logits.shape == (3, 2) and torch.equal(output.loss, expected)
    assert made(**{n: x for n, x in batch.items() if n != "labels"}).loss is None


def _blocks():
    return BlockMap(3, (1, 1), (1,))


def _tunable(model, blocks, method):
    """From the same start: peft draws what LoRA starts with from the global generator."""
    torch.manual_seed(3)
    return tunable(model, blocks, SPEC, Method(method))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_whole_middle_it_is_tuning_the_full_model_to_the_last_bit(family, method, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    model, batches = tiny(family), [batch_of(seed) for seed in range(3)]
    bundle = make(model, (1, 1), "keep:all", tmp_path / "bundle")
    sides = [_tunable(side, bundle.blocks, method) for side in (bundle.model, model)]
    for side in sides:
        before = copy.deepcopy(side.state_dict())
        tune(side, trainable(side), batches)
        assert any(not torch.equal(before[name], x) for name, x in side.state_dict().items())
    heads = [name for name in sides[0].state_dict() if name.startswith("head.")]
    assert bool(heads) == (family not in LANGUAGE)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", sides[0], bundle, SPEC, Method(method))
    plugged = plug(model, tmp_path / "adapter", tmp_path / "plugged")
    auto = hf.AutoModelForCausalLM if family in LANGUAGE else hf.AutoModelForMultipleChoice
    loaded = auto.from_pretrained(tmp_path / "plugged").eval()
    inputs = {name: x for name, x in batch_of(5).items() if name != "labels"}
    with torch.no_grad():
        found = [choose(side, **inputs) for side in (plugged, loaded)]
        expected = sides[1].merged().eval() if method == "lora" else sides[1].model
    weights = expected.state_dict()
    for side in (plugged, loaded):
        assert side.state_dict().keys() == weights.keys()
        for name, x in side.state_dict().items():
            assert torch.equal(x, weights[name]), name
    for logits in found:  # the last bit of PyTorch's products may depend on where a matrix begins in memory
        torch.testing.assert_close(logits, choose(expected, **inputs), rtol=1e-5, atol=1e-6)
    if family in LANGUAGE:
        assert plugged.config.use_cache


def test_only_models_that_can_choose_are_taken():
    with pytest.raises(ValueError, match="transformers has no multiple-choice for t5 models"):
        with_head(tiny("t5-encoder"), SPEC.name)
    with pytest.raises(ValueError, match="a ladder does not choose among answers"):
        tunable(tiny("gpt2"), _blocks(), SPEC, Method("ladder"))
    assert head_parameters(tiny("gpt2"), SPEC.name) == []


def test_a_manifest_with_labels_for_it_is_refused():
    task = {"name": SPEC.name, "labels": 3, "problem_type": None, "label_names": None, "pad_token_id": None}
    with pytest.raises(InputError, match="null for multiple-choice"):
        TaskSpec.check(task)
    assert TaskSpec.check(task | {"labels": None}).name == SPEC.name
