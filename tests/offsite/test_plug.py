"""Bundle, tuning, adapter, plug: with the whole middle kept it is tuning the full model, to the last bit."""

import copy
import json

import pytest
import torch
import transformers as hf

from tests.models import inputs_of, tiny
from tests.offsite.tuning import FAMILIES, IMAGES, LANGUAGE, batches_of, spec_of, trainable, tune
from tlfast import LadderModel, freeze
from tlfast.data import InputError
from tlfast.offsite import Bundle, Method, TaskSpec, architecture, make, plug, save_adapter, tasks, tunable
from tlfast.offsite.tasks import head_parameters, with_head

AUTO = {
    "causal-lm": hf.AutoModelForCausalLM,
    "sequence-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "image-classification": hf.AutoModelForImageClassification,
}
DROPOUT = ("hidden_dropout_prob", "attention_dropout", "dropout_rate", "resid_pdrop", "attn_pdrop", "dropout")


def model_of(family, seed=0):
    """Four random blocks, with dropout in training where the family has it."""
    name = type(tiny(family).config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings = {name: 4} | {key: 0.1 for key in DROPOUT if hasattr(tiny(family).config, key)}
    settings |= {"layer_types": ["full_attention"] * 4} if family == "qwen2" else {}
    return tiny(family, seed, **settings)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_a_padding_token_is_one_of_the_vocabulary(task):
    model = tiny("llama")
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id: got 97, and the model has 97 tokens"):
        with_head(model, task, 2, pad_token_id=97)
    assert with_head(model, task, 2, pad_token_id=96).config.pad_token_id == 96


def test_a_task_with_a_second_list_of_blocks_is_refused_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr(tasks, "seeded", lambda seed: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match="takes more than one list of blocks"):
        with_head(tiny("t5-encoder"), "sequence-classification", 2)


def sent(bundle, family, folder, method=None, model=None):
    """A data owner's work: tune on a bundle alone and write the adapter."""
    method = method or Method()
    tuned = tunable(bundle.model, bundle.blocks, spec_of(family), method)
    tune(tuned, trainable(tuned), batches_of(family))
    folder.mkdir()
    save_adapter(folder, tuned, bundle, spec_of(family), method)
    return tuned


def tuned_directly(model, family, adapter=(1, 1)):
    """The full model tuned by plain transformers: first and last blocks and the head, all else frozen."""
    spec = spec_of(family)
    full = with_head(model, spec.name, spec.labels, spec.problem_type, spec.pad_token_id)
    path, count = architecture.blocks_path(full), len(architecture.find_blocks(full).blocks)
    inside = {*range(adapter[0]), *range(count - adapter[1], count)}
    chosen = (*(f"{path}.{i}." for i in inside), *head_parameters(full, spec.name))
    for name, parameter in full.named_parameters():
        parameter.requires_grad_(name.startswith(chosen))
    tune(full, trainable(full), batches_of(family))
    return full


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_whole_middle_it_is_tuning_the_full_model_to_the_last_bit(family, tmp_path):
    model = model_of(family)
    make(model, (1, 1), "keep:all", tmp_path / "bundle")
    sent(Bundle.read(tmp_path / "bundle"), family, tmp_path / "adapter")
    plugged = plug(model, tmp_path / "adapter", tmp_path / "plugged")
    direct = tuned_directly(model, family)
    state, expected = plugged.state_dict(), direct.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    before = with_head(model, spec_of(family).name, spec_of(family).labels, pad_token_id=1).state_dict()
    changed = {name for name in expected if not torch.equal(before[name], expected[name])}
    assert changed, "training did something"
    loaded, report = AUTO[spec_of(family).name].from_pretrained(tmp_path / "plugged", output_loading_info=True)
    assert type(loaded) is type(plugged) and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        inputs = inputs_of(family)
        assert torch.equal(loaded.eval()(**inputs).logits, direct(**inputs).logits)


@pytest.mark.parametrize("family", [*LANGUAGE, "bert"])
def test_classes_are_tuned_in_decoders_too(family, tmp_path):
    """Sequence classification on a base model or a language model, to the last bit."""
    model, spec = model_of(family), TaskSpec("sequence-classification", 3, "single_label_classification", None, 1)
    bundle = make(model, (1, 1), "keep:all", tmp_path / "bundle")
    batches = [inputs_of(family, seed) | {"labels": torch.tensor([2, 0, 1])} for seed in range(3)]
    tuned = tunable(bundle.model, bundle.blocks, spec, Method())
    full = tunable(model, bundle.blocks, spec, Method())
    for side in (tuned, full):
        tune(side, trainable(side), batches)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", tuned, bundle, spec, Method())
    plugged = plug(model, tmp_path / "adapter", tmp_path / "plugged")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plugged").eval()
    with torch.no_grad():
        inputs = inputs_of(family)
        assert torch.equal(plugged(**inputs).logits, full(**inputs).logits)
        assert torch.equal(loaded(**inputs).logits, full(**inputs).logits)


@pytest.mark.parametrize("recipe", ["keep:1", "svd:8", "prune:0.5", "int8", "nf4"])
def test_only_adapter_and_head_of_the_full_model_change(recipe, tmp_path):
    model = model_of("bert")
    bundle = make(model, (1, 1), recipe, tmp_path / "bundle")
    tuned = sent(bundle, "bert", tmp_path / "adapter")
    plugged = plug(model, tmp_path / "adapter").state_dict()
    own = model.state_dict()
    for name, tensor in own.items():
        place = next((i for i in range(4) if f"encoder.layer.{i}." in name), None)
        if place in (1, 2) or name.startswith("embeddings."):
            assert torch.equal(plugged[f"bert.{name}"], tensor)
        elif place in (0, 3) and tensor.dim() == 2:
            theirs = "bert." + name.replace("layer.3", f"layer.{len(bundle.blocks.kept) - 1}")
            assert torch.equal(plugged[f"bert.{name}"], tuned.model.state_dict()[theirs])
            assert not torch.equal(plugged[f"bert.{name}"], tensor)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5-encoder", "vit", "clip-vision"])
def test_lora_is_pefts_to_the_last_bit(family, tmp_path):
    peft = pytest.importorskip("peft")
    model, method = model_of(family), Method("lora", rank=3, alpha=6)
    make(model, (1, 1), "keep:all", tmp_path / "bundle")
    tuned = sent(Bundle.read(tmp_path / "bundle"), family, tmp_path / "adapter", method)
    assert all("lora_" in name or name.startswith("head.") for name in tuned.state_dict())
    plugged = plug(model, tmp_path / "adapter", tmp_path / "plugged")
    merged = copy.deepcopy(tuned).merged()
    state, expected = plugged.state_dict(), merged.state_dict()
    assert state.keys() == expected.keys() and not any("lora" in name for name in state)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    loaded = AUTO[spec_of(family).name].from_pretrained(tmp_path / "plugged").eval()
    assert not isinstance(loaded, peft.PeftModel)
    with torch.no_grad():
        inputs = inputs_of(family)
        assert torch.equal(loaded(**inputs).logits, plugged(**inputs).logits)
        assert torch.allclose(plugged(**inputs).logits, tuned(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_ladder_climbs_the_same_blocks_of_the_full_model(family, tmp_path):
    model, method = model_of(family), Method("ladder", ladder={"reduction": 4, "init": "random"})
    bundle = make(model, (1, 1), "keep:1", tmp_path / "bundle")
    tuned = sent(bundle, family, tmp_path / "adapter", method)
    plugged = plug(model, tmp_path / "adapter", tmp_path / "plugged")
    assert isinstance(plugged, LadderModel) and plugged.backbone.tap_indices == (0, 1, 3)
    state = plugged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tuned.state_dict().items())
    loaded = LadderModel.from_pretrained(tmp_path / "plugged", freeze(copy.deepcopy(model)))
    with torch.no_grad():
        inputs = inputs_of(family)
        assert torch.equal(loaded(**inputs).logits, plugged(**inputs).logits)


def test_labels_have_their_names(tmp_path):
    model = model_of("bert")
    bundle = make(model, (1, 1), "keep:1", tmp_path / "bundle")
    sent(bundle, "bert", tmp_path / "adapter")
    plug(model, tmp_path / "adapter", tmp_path / "plugged")
    config = json.loads((tmp_path / "plugged" / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "perhaps", "2": "yes"} and config["label2id"]["yes"] == 2


def test_the_adapter_holds_nothing_but_the_delta(tmp_path):
    bundle = make(model_of("gpt2"), (1, 1), "keep:1", tmp_path / "bundle")
    sent(bundle, "gpt2", tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.safetensors", "manifest.json"]
    header = (tmp_path / "adapter" / "adapter.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).keys() - {"__metadata__"}
    assert all(name.startswith(("blocks.first.0.", "blocks.last.0.")) for name in names) and names


def test_another_model_another_secret_or_another_bundle_is_refused(tmp_path):
    model = model_of("bert")
    make(model, (1, 1), "keep:1", tmp_path / "bundle", secret=b"of the owner")
    sent(Bundle.read(tmp_path / "bundle"), "bert", tmp_path / "adapter")
    plug(model, tmp_path / "adapter", bundle=tmp_path / "bundle", secret=b"of the owner")
    before = sorted(tmp_path.rglob("*"))
    for other, secret in ((model, b""), (model, b"another"), (model_of("bert", seed=1), b"of the owner")):
        with pytest.raises(InputError, match="its bundle was not made of this model"):
            plug(other, tmp_path / "adapter", tmp_path / "out", secret=secret)
    nudged = copy.deepcopy(model)
    with torch.no_grad():
        nudged.encoder.layer[2].output.dense.weight[0, 0] += 1e-6
    with pytest.raises(InputError, match="its bundle was not made of this model"):
        plug(nudged, tmp_path / "adapter", tmp_path / "out", secret=b"of the owner")
    assert sorted(tmp_path.rglob("*")) == before
    make(model, (1, 1), "keep:2", tmp_path / "other", secret=b"of the owner")
    with pytest.raises(InputError, match="was trained on another bundle"):
        plug(model, tmp_path / "adapter", tmp_path / "out", tmp_path / "other", b"of the owner")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="is there already"):
        plug(model, tmp_path / "adapter", tmp_path / "out", secret=b"of the owner")


def test_images_are_no_texts(tmp_path):
    bundle = make(model_of("vit"), (1, 1), "keep:1", tmp_path / "bundle")
    assert "vit" in IMAGES
    with pytest.raises(ValueError, match="transformers has no sequence-classification for vit models"):
        tunable(bundle.model, bundle.blocks, TaskSpec("sequence-classification", 3), Method())
    with pytest.raises(ValueError, match="has no language-model head"):
        tunable(bundle.model, bundle.blocks, TaskSpec("causal-lm"), Method())
    with pytest.raises(ValueError, match="num_labels: got None"):
        tunable(bundle.model, bundle.blocks, TaskSpec("image-classification"), Method())
    with pytest.raises(ValueError, match="method: 'prefix' is not available; allowed: full, lora, ladder"):
        Method("prefix")
