"""A bundle comes from a stranger: whatever is wrong is refused with the reason, nothing is run and nothing written."""

import json
import shutil
import sys

import pytest
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models import tiny
from tests.offsite import attacks
from tlfast.data import InputError
from tlfast.offsite import Bundle, make, preprocessor
from tlfast.offsite.architecture import check_settings, model_class

WEIGHTS = "model.safetensors"
PANIC = type("PanicException", (BaseException,), {})  # as PyO3 makes it

OWN = {
    "a class outside transformers": attacks.put("model", "class", value="os.system"),
    "a class that is no model": attacks.put("model", "class", value="AutoTokenizer"),
    "a class for another type": attacks.put("model", "class", value="GPT2Model"),
    "a class with another head": attacks.put("model", "class", value="BertForMaskedLM"),
    "an automatic class": attacks.put("model", "class", value="AutoModel"),
    "an unknown type": attacks.put("model", "type", value="timm_backbone"),
    "a type that is a list": attacks.put("model", "type", value=["bert"]),
    "attention from a hub": attacks.put("model", "attention", value="kernels-community/evil"),
    "a setting from a hub": attacks.put("model", "config", "hidden_act", value="evil/activation"),
    "an unknown activation": attacks.put("model", "config", "hidden_act", value="evil"),
    "remote code": attacks.put("model", "config", "auto_map", value={"AutoModel": "x.Y"}),
    "a quantiser": attacks.put("model", "config", "quantization_config", value={"quant_method": "bitsandbytes"}),
    "an attention setting": attacks.put("model", "config", "_attn_implementation", value="evil"),
    "a setting that is a path": attacks.put("model", "config", "hidden_act", value="../../x"),
    "a million blocks": attacks.put("model", "config", "num_hidden_layers", value=1000000),
    "no blocks": attacks.put("model", "config", "num_hidden_layers", value=0),
    "blocks in a text": attacks.put("model", "config", "num_hidden_layers", value="3"),
    "a huge width": attacks.put("model", "config", "hidden_size", value=1 << 30),
    "a number too large": attacks.put("model", "config", "hidden_size", value=1 << 70),
    "a number beyond every float": attacks.put("model", "config", "hidden_size", value=10**400),
    "a number beyond every float in a list": attacks.put("model", "config", "hidden_act", value=[-(10**400)]),
    "a negative width": attacks.put("model", "config", "hidden_size", value=-48),
    "no heads": attacks.put("model", "config", "num_attention_heads", value=0),
    "a huge vocabulary": attacks.put("model", "config", "vocab_size", value=1 << 31),
    "a configuration that is a list": attacks.put("model", "config", value=[]),
    "a deep configuration": attacks.put("model", "config", "hidden_act", value=[[[[[["x"]]]]]]),
    "too many labels": attacks.put("model", "labels", value=1 << 40),
    "blocks that are not there": attacks.put("blocks", "middle", value=[1, 2, 3]),
    "blocks out of order": attacks.put("blocks", "middle", value=[1, 1]),
    "an adapter over all": attacks.put("blocks", "adapter", value=[1, 2]),
    "an adapter of three": attacks.put("blocks", "adapter", value=[1, 1, 1]),
    "no adapter": attacks.put("blocks", "adapter", value=[0, 0]),
    "a negative adapter": attacks.put("blocks", "adapter", value=[-1, 2]),
    "a total below the blocks": attacks.put("blocks", "total", value=2),
    "a huge total": attacks.put("blocks", "total", value=1 << 40),
    "another dtype": attacks.put("dtype", value="float64"),
    "a recipe with a line": attacks.put("emulator", "recipe", value="keep:2\n\x1b[31m"),
    "an unknown encoding": attacks.put("encodings", value={"x": {"kind": "pickle", "rank": 0}}),
    "an encoding of nothing": attacks.put("encodings", value={"x": {"kind": "int8", "rank": 0}}),
    "a huge rank": attacks.put("encodings", "encoder.layer.1.output.dense.weight", "rank", value=1 << 24),
    "another rank": attacks.put("encodings", "encoder.layer.1.output.dense.weight", "rank", value=7),
    "another encoding": attacks.put("encodings", "encoder.layer.1.output.dense.weight", "kind", value="int8"),
    "a seal that is none": attacks.put("seal", value="x" * 64),
    "a nonce that is none": attacks.put("nonce", value=[]),
    "an unlisted tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "a tokenizer that is not there": attacks.put("files", "tokenizer.json", value={"bytes": 2, "sha256": "0" * 64}),
    "a preprocessor of another kind": attacks.put("preprocessor", value={"kind": "processor"}),
    "an image processor from elsewhere": attacks.put(
        "preprocessor", value={"kind": "image processor", "class": "os.system", "settings": {}}
    ),
    "an image processor of no class": attacks.put(
        "preprocessor", value={"kind": "image processor", "class": "EvilImageProcessor", "settings": {}}
    ),
    "an image processor of a family that has no bundles": attacks.put(
        "preprocessor", value={"kind": "image processor", "class": "SamImageProcessor", "settings": {}}
    ),
    "an image processor of huge images": attacks.put(
        "preprocessor",
        value={
            "kind": "image processor",
            "class": "ViTImageProcessor",
            "settings": {"size": {"height": 1 << 20, "width": 1 << 20}},
        },
    ),
    "an image processor with more": attacks.put(
        "preprocessor", value={"kind": "image processor", "class": "ViTImageProcessor", "settings": {"auto_map": {}}}
    ),
}
ATTACKS = {**attacks.attacks_on(WEIGHTS), **OWN}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "bundle"
    make(tiny("bert"), (1, 1), "svd:8", folder)
    return folder


@pytest.fixture
def bundle(good, tmp_path):
    return shutil.copytree(good, tmp_path / "bundle")


def refused(folder):
    """That a folder is refused in one line that names a place, and that nothing came of it."""
    before = sorted(str(path) for path in folder.parent.rglob("*"))
    modules = set(sys.modules)
    with pytest.raises(InputError) as caught:
        Bundle.read(folder)
    message = str(caught.value)
    assert str(folder) in message or message.startswith(("model", "encodings", "config", "blocks", "preprocessor"))
    assert len(message) < 700
    assert sorted(str(path) for path in folder.parent.rglob("*")) == before
    assert not {
        name for name in set(sys.modules) - modules if "evil" in name or name.startswith("transformers_modules")
    }
    return message


def test_the_good_one_is_read(bundle):
    assert Bundle.read(bundle).blocks.kept == (0, 1, 2)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name, bundle):
    ATTACKS[name](bundle)
    refused(bundle)


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_cut_at_every_percent(start, good, tmp_path):
    for percent in range(start, start + 10):
        bundle = shutil.copytree(good, tmp_path / str(percent))
        attacks.cut(WEIGHTS, percent)(bundle)
        assert "not whole" in (message := refused(bundle)) or "the file is not" in message
        attacks.resign(bundle)
        refused(bundle)
        manifest = shutil.copytree(good, tmp_path / f"m{percent}") / "manifest.json"
        text = manifest.read_bytes().rstrip()
        manifest.write_bytes(text[: len(text) * percent // 100])
        refused(manifest.parent)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t5", "num_decoder_layers"),
        ("bart", "decoder_layers"),
        ("gpt2", "n_layer"),
        ("deberta-v2", "pooler_hidden_size"),
    ],
)
def test_settings_that_no_tensor_is_compared_with_are_bounded(kind, name):
    check_settings(kind, {name: 1024})
    for value in (2_000_000_000, 8193, -1):
        with pytest.raises(InputError, match=f"config.{name}: {value} is refused"):
            check_settings(kind, {name: value})


@pytest.mark.parametrize("error", [RuntimeError, ImportError])
def test_a_class_that_cannot_be_imported_is_none(error, monkeypatch):
    def fail(module, name):
        raise error(name)

    monkeypatch.setattr(type(sys.modules["transformers"]), "__getattr__", fail)
    with pytest.raises(InputError, match="'BrokenModel' is refused"):
        model_class("BrokenModel", "bert")


@pytest.mark.parametrize("error", [RuntimeError, ImportError, OSError])
def test_an_image_processor_that_cannot_be_made_here_is_refused(error, monkeypatch):
    def fail(self):
        raise error("no such package")

    broken = type("ViTImageProcessor", (), {"__init__": fail, "__module__": "transformers.models.vit"})
    monkeypatch.setattr(sys.modules["transformers"], "ViTImageProcessor", broken)
    with pytest.raises(InputError, match=r"ViTImageProcessor needs a package that is not here \(no such package\)"):
        preprocessor.load({"kind": "image processor", "class": "ViTImageProcessor", "settings": {}}, None)


def test_an_image_processor_of_another_family_is_not_reached(monkeypatch):
    monkeypatch.setattr(type(hf), "__getattr__", lambda module, name: pytest.fail(f"{name} was imported"))
    with pytest.raises(InputError, match="allowed: the image processors of ViT"):
        preprocessor.check({"kind": "image processor", "class": "SamImageProcessor", "settings": {}}, "preprocessor")


@pytest.mark.parametrize(("raised", "expected"), [(PANIC, InputError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_panic_of_tokenizers_is_a_refusal_and_ctrl_c_is_not(raised, expected, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")

    class Broken:
        @staticmethod
        def from_buffer(content):
            raise raised("index out of bounds")

    monkeypatch.setattr(tokenizers, "Tokenizer", Broken)
    with pytest.raises(expected):
        preprocessor.load({"kind": "tokenizer"}, b"{}")


def test_what_is_no_folder_of_a_bundle(good, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Bundle.read(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be read"):
        Bundle.read(tmp_path / "file")
    (tmp_path / "link").symlink_to(good)
    with pytest.raises(InputError, match="is a symbolic link"):
        Bundle.read(tmp_path / "link")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """The path of every value in a manifest."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_anywhere_in_the_manifest_is_refused_or_as_harmless_as_before(good, tmp_path_factory, data):
    manifest = json.loads((good / "manifest.json").read_text())
    path = data.draw(st.sampled_from([path for path in places(manifest) if path]), label="place")
    value = data.draw(JSON, label="value")
    folder = shutil.copytree(good, tmp_path_factory.mktemp("m") / "bundle")
    attacks.put(*path, value=value)(folder)
    try:
        read = Bundle.read(folder)
    except InputError:
        return
    finally:
        shutil.rmtree(folder.parent)
    # what passes is a free text, or a setting of the same model: same class, same tensors
    assert path[0] in ("tlfast", "transformers", "emulator", "nonce", "seal", "model", "blocks", "files", "encodings")
    assert type(read.model).__name__ == "BertModel"
    assert {n: p.shape for n, p in read.model.named_parameters()} == {
        n: p.shape for n, p in tiny("bert").named_parameters()
    }


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(JSON)
def test_any_json_in_the_place_of_the_manifest_is_refused(good, tmp_path_factory, content):
    folder = shutil.copytree(good, tmp_path_factory.mktemp("m") / "bundle")
    (folder / "manifest.json").write_text(json.dumps(content))
    refused(folder)
    shutil.rmtree(folder.parent)
