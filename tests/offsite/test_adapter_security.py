"""An adapter comes from a stranger too: whatever is wrong is refused before the full model is touched."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import digest, tiny
from tests.offsite import attacks
from tests.offsite.test_bundle_security import JSON, places
from tlfast.data import InputError
from tlfast.offsite import Method, TaskSpec, make, plug, save_adapter, tunable

WEIGHTS = "adapter.safetensors"
SPEC = TaskSpec("sequence-classification", 3, "single_label_classification", ("a", "b", "c"))


def of_bundle(change, resealed=True):
    """Change the bundle's manifest inside the adapter's; its digest too, as a stranger would."""

    def attack(manifest):
        bundle = json.loads(manifest["bundle"])
        change(bundle)
        manifest["bundle"] = json.dumps(bundle)
        if resealed:
            manifest["bundle_sha256"] = attacks.hashlib.sha256(manifest["bundle"].encode()).hexdigest()

    return attacks.edit_manifest(attack)


OWN = {
    "another bundle's digest": attacks.put("bundle_sha256", value="0" * 64),
    "another bundle": of_bundle(lambda bundle: bundle.update(nonce="0" * 32)),
    "another bundle, with the digest of the first": of_bundle(lambda bundle: bundle.update(nonce="0" * 32), False),
    "a wider adapter than was sent": of_bundle(lambda bundle: bundle["blocks"].update(adapter=[2, 1], middle=[2])),
    "a seal of zeros": of_bundle(lambda bundle: bundle.update(seal="0" * 64)),
    "a bundle that is no text": attacks.put("bundle", value={"seal": 1}),
    "a bundle that is no JSON": attacks.put("bundle", value="{"),
    "a bundle with half a character": attacks.put("bundle", value="\ud800"),
    "another task": attacks.put("task", "name", value="token-classification"),
    "no task": attacks.put("task", "name", value="exec"),
    "a language model with labels": attacks.put("task", "name", value="causal-lm"),
    "more labels": attacks.put("task", "labels", value=4),
    "labels beyond the file": attacks.put("task", "labels", value=100000),
    "no labels": attacks.put("task", "labels", value=0),
    "a million labels": attacks.put("task", "labels", value=1 << 40),
    "labels of the same name": attacks.put("task", "label_names", value=["a", "a", "a"]),
    "labels that are numbers": attacks.put("task", "label_names", value=[1, 2, 3]),
    "an endless label": attacks.put("task", "label_names", value=["a", "b", "c" * 1000]),
    "a problem that is none": attacks.put("task", "problem_type", value="pickle"),
    "a huge padding token": attacks.put("task", "pad_token_id", value=1 << 60),
    "another method": attacks.put("method", "name", value="lora"),
    "no method": attacks.put("method", "name", value="exec"),
    "a ladder": attacks.put("method", "name", value="ladder"),
    "a huge rank": attacks.put("method", "rank", value=1 << 40),
    "a ladder of code": attacks.put("method", "ladder", value={"__class__": "os.system"}),
    "a ladder out of range": attacks.put("method", "ladder", value={"reduction": 0}),
    "a tensor of the middle": attacks.edit_header(
        WEIGHTS, lambda header: attacks.rename(header, "bert.encoder.layer.1.output.dense.weight")
    ),
    "the whole model beside it": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
}
ATTACKS = {**attacks.attacks_on(WEIGHTS), **OWN}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The full model and an adapter for it."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny("bert", num_hidden_layers=4)
    bundle = make(model, (1, 1), "keep:1", folder / "bundle")
    torch.manual_seed(3)
    tuned = tunable(bundle.model, bundle.blocks, SPEC, Method())
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter", tuned, bundle, SPEC, Method())
    return model, folder / "adapter"


@pytest.fixture
def adapter(good, tmp_path):
    return shutil.copytree(good[1], tmp_path / "adapter")


def refused(model, folder):
    """That an adapter is refused in one line, the model is as it was, and nothing was written."""
    before, entries = digest(model), sorted(str(path) for path in folder.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        plug(model, folder, folder.parent / "out")
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 700
    assert digest(model) == before
    assert sorted(str(path) for path in folder.parent.rglob("*")) == entries
    return str(caught.value)


def test_the_good_one_is_plugged(good, adapter):
    plug(good[0], adapter, adapter.parent / "out")
    assert (adapter.parent / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, good, adapter):
    ATTACKS[name](adapter)
    refused(good[0], adapter)


@pytest.mark.parametrize("start", range(0, 100, 20))
def test_cut_at_every_percent(start, good, tmp_path):
    for percent in range(start, start + 20):
        adapter = shutil.copytree(good[1], tmp_path / str(percent))
        attacks.cut(WEIGHTS, percent)(adapter)
        refused(good[0], adapter)
        attacks.resign(adapter)
        refused(good[0], adapter)
        manifest = shutil.copytree(good[1], tmp_path / f"m{percent}") / "manifest.json"
        text = manifest.read_bytes().rstrip()
        manifest.write_bytes(text[: len(text) * percent // 100])
        refused(good[0], manifest.parent)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_anywhere_in_the_manifest_is_refused_or_harmless(good, tmp_path_factory, data):
    model, folder = good
    manifest = json.loads((folder / "manifest.json").read_text())
    path = data.draw(st.sampled_from([path for path in places(manifest) if path]), label="place")
    value = data.draw(JSON, label="value")
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("a") / "adapter")
    attacks.put(*path, value=value)(copy)
    try:
        plugged = plug(model, copy)
    except InputError:
        return
    finally:
        shutil.rmtree(copy.parent)
    assert path[0] in ("tlfast", "task", "method")
    assert type(plugged).__name__ == "BertForSequenceClassification" and plugged.config.num_labels == 3


def test_what_is_not_finite_is_not_sent(tmp_path):
    bundle = make(tiny("bert"), (1, 1), "keep:1", tmp_path / "bundle")
    tuned = tunable(bundle.model, bundle.blocks, SPEC, Method())
    with torch.no_grad():
        next(p for p in tuned.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(ValueError, match="holds NaN or infinity; train with a lower learning rate"):
        save_adapter(tmp_path, tuned, bundle, SPEC, Method())
