"""Prepared backbones saved and loaded: to the last bit the same, mapped and not copied, and every damage refused."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import tlfast
from benchmarks.memory import peak_bytes
from tests.models import CONFIGS, inputs_of, tiny
from tlfast.backbone import FrozenBackbone
from tlfast.backbone.linear import FrozenEmbedding
from tlfast.ops import FrozenWeight

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
EVERY_KIND = ("bert", "vit", "gpt2", "llama", "t5-v1.1")
CASES = [(family, "int8") for family in CONFIGS]
CASES += [(family, precision) for family in EVERY_KIND for precision in PRECISIONS if precision != "int8"]
WEIGHTS, MANIFEST = "frozen.safetensors", "frozen.json"


def outputs(output):
    halves = (output.encoder, output.decoder) if hasattr(output, "encoder") else (output,)
    return [tensor for half in halves for tensor in (half.embedding, *half.taps, half.last_hidden_state)]


def assert_same(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(outputs(ours), outputs(theirs), strict=True))


def wide_bert(**settings):
    """A BERT with a table that is worth storing."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    torch.manual_seed(0)
    return hf.BertModel(hf.BertConfig(**sizes | {"vocab_size": 1000} | settings)).eval()


IDS = {"input_ids": torch.arange(3, 27).view(2, 12)}


def again(backbone, folder, **settings):
    backbone.save_pretrained(folder)
    return FrozenBackbone.from_pretrained(folder, **settings)


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_it_is_the_same_to_the_last_bit(family, precision, tmp_path):
    backbone, inputs = tlfast.freeze(tiny(family), precision), inputs_of(family)
    loaded = again(backbone, tmp_path / "saved")
    assert_same(loaded(**inputs), backbone(**inputs))
    assert loaded.describe() == backbone.describe() and str(loaded) == str(backbone)
    assert loaded.weight_bytes() == backbone.weight_bytes()
    assert loaded.fingerprint() == backbone.fingerprint()
    assert (loaded.block_spec, loaded.name, loaded.precision) == (backbone.block_spec, backbone.name, precision)
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training
    if backbone.lm_head is not None:
        assert loaded.lm_head.fingerprint() == backbone.lm_head.fingerprint()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_mapped_and_lie_side_by_side(precision, tmp_path):
    model = wide_bert()
    backbone = tlfast.freeze(model, precision)
    loaded = again(backbone, tmp_path / "saved")
    assert_same(loaded(**IDS), backbone(**IDS))
    if Path("/proc/self/maps").is_file():
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in maps if line.endswith(str(tmp_path / "saved" / WEIGHTS))]
        spans = [(int(first, 16), int(end, 16)) for first, end in spans]
        for name, tensor in loaded.state_dict().items():
            if tensor.nbytes % 64 == 0:
                assert any(first <= tensor.data_ptr() < end for first, end in spans), name
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.model.state_dict().values())
    if precision != "fp32":
        attention = loaded.blocks[0].attention.self
        pieces = [getattr(attention, name).stored for name in ("query", "key", "value")]
        assert FrozenWeight.joined(pieces).outputs == 3 * 128
        assert isinstance(loaded.model.embeddings.word_embeddings, FrozenEmbedding)


def test_no_model_is_made_on_the_way(tmp_path):
    backbone = tlfast.freeze(wide_bert(), "int8")
    backbone.save_pretrained(tmp_path / "saved")
    float32 = sum(p.nbytes for p in wide_bert().parameters())
    mapped = (tmp_path / "saved" / WEIGHTS).stat().st_size  # PyTorch counts the map as taken
    FrozenBackbone.from_pretrained(tmp_path / "saved")
    assert peak_bytes(lambda: FrozenBackbone.from_pretrained(tmp_path / "saved")) < mapped + float32 / 50


def test_tied_tables_are_one(tmp_path):
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 2, "vocab_size": 2000}
    model = hf.T5Model(hf.T5Config(**sizes, decoder_start_token_id=0))
    loaded = again(tlfast.freeze(model, "int8"), tmp_path / "saved")
    assert loaded.model.shared is loaded.model.encoder.embed_tokens is loaded.model.decoder.embed_tokens
    assert isinstance(loaded.model.shared, FrozenEmbedding)
    saved = load_file(tmp_path / "saved" / WEIGHTS)
    assert sum(tuple(tensor.shape) == (2000, 64) for tensor in saved.values()) == 1


def test_taps_are_chosen_when_loading(tmp_path):
    tlfast.freeze(tiny("bart"), "int8").save_pretrained(tmp_path / "saved")
    loaded = FrozenBackbone.from_pretrained(str(tmp_path / "saved"), taps=[-1])
    assert {name: stack.taps for name, stack in loaded.stacks.items()} == {"encoder": (2,), "decoder": (1,)}
    with pytest.raises(ValueError, match=r"^taps: 9 is not a block; the model has blocks 0 to 2"):
        FrozenBackbone.from_pretrained(tmp_path / "saved", taps=[9])


def test_calibrated_columns_are_kept(tmp_path):
    batch = {"input_ids": torch.randint(3, 90, (4, 10), generator=torch.Generator().manual_seed(0))}
    backbone = tlfast.freeze(tiny(), "int8", calibration=[batch])
    loaded = again(backbone, tmp_path / "saved")
    smooth = loaded.blocks[0].attention.self.query.smooth
    assert torch.equal(smooth, backbone.blocks[0].attention.self.query.smooth) and (smooth != 1).any()
    assert_same(loaded(**batch), backbone(**batch))


def test_what_the_configuration_makes_and_the_model_has_not(tmp_path):
    headless = hf.BertForMaskedLM(wide_bert().config).bert  # without a pooler
    assert_same(again(tlfast.freeze(headless, "int8"), tmp_path / "a")(**IDS), tlfast.freeze(headless, "int8")(**IDS))
    masked = hf.ViTForMaskedImageModeling(tiny("vit").config).vit  # with a mask token
    with torch.no_grad():
        masked.embeddings.mask_token.normal_()
    loaded = again(tlfast.freeze(masked), tmp_path / "b")
    assert_same(loaded(**inputs_of("vit")), tlfast.freeze(masked)(**inputs_of("vit")))
    assert torch.equal(loaded.model.embeddings.mask_token, masked.embeddings.mask_token)


def test_blocks_that_were_named(tmp_path):
    model = tiny("bert")
    backbone = tlfast.freeze(model, "int8", blocks="encoder.layer")
    loaded = again(backbone, tmp_path / "saved")
    assert loaded.stack.name == "blocks" and loaded.stack.parts is None
    assert_same(loaded(**inputs_of("bert")), backbone(**inputs_of("bert")))


def test_eager_attention_stays_eager(tmp_path):
    model = tiny("bert")
    model.set_attn_implementation("eager")
    loaded = again(tlfast.freeze(model), tmp_path / "saved")
    assert loaded.config._attn_implementation == "eager"


def test_a_ladder_stands_on_it_and_writes(tmp_path):
    model = tiny("gpt2")
    model.generation_config.max_new_tokens = 5
    backbone = tlfast.freeze(model, "bf16")
    torch.manual_seed(0)
    ladder = tlfast.LadderModel(backbone, task="causal-lm", config=tlfast.LadderConfig(reduction=2)).eval()
    inputs = inputs_of("gpt2")
    logits = ladder(**inputs).logits
    ladder.save_pretrained(tmp_path / "ladder")
    loaded = again(backbone, tmp_path / "saved")
    other = tlfast.LadderModel.from_pretrained(tmp_path / "ladder", backbone=loaded)
    assert torch.equal(other(**inputs).logits, logits)
    ids = inputs["input_ids"][:1]
    settings = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    assert torch.equal(other.generate(**settings), ladder.generate(**settings))
    assert loaded.model.generation_config.max_new_tokens == 5


def test_a_tokenizer_lies_beside(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\n")
    tlfast.freeze(tiny(), "int8").save_pretrained(
        tmp_path / "saved", tokenizer=hf.BertTokenizer(str(tmp_path / "vocab.txt"))
    )
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "saved")("good")["input_ids"] == [2, 5, 3]
    with pytest.raises(TypeError, match="tokenizer: got a int; pass a tokenizer or image processor"):
        tlfast.freeze(tiny(), "int8").save_pretrained(tmp_path / "other", tokenizer=7)
    assert not (tmp_path / "other").exists()


def test_progress_counts_every_byte(tmp_path):
    counts = []
    tlfast.freeze(tiny(), "int8").save_pretrained(tmp_path / "saved", progress=counts.append)
    tensors = load_file(tmp_path / "saved" / WEIGHTS)
    assert sum(counts) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_side_by_side_after_a_move(precision):
    backbone = tlfast.freeze(wide_bert(), precision)
    before = outputs(backbone(**IDS))
    held = backbone.state_dict()  # so that no new memory can be where the old was
    backbone._apply(torch.clone)  # what to(device) does to every tensor
    assert all(torch.equal(a, b) for a, b in zip(outputs(backbone(**IDS)), before, strict=True))
    assert all(tensor.data_ptr() != held[name].data_ptr() for name, tensor in backbone.state_dict().items())


# what is refused


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)) for _ in range(2))

    def forward(self, inputs_embeds):
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


def test_models_that_cannot_be_made_again(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained: Own has no configuration"):
        tlfast.freeze(Own(), "int8").save_pretrained(tmp_path / "saved")
    own = Own()
    own.config = tiny().config
    own.config.model_type = "own"
    with pytest.raises(ValueError, match="model: Own is not one of transformers' own models"):
        tlfast.freeze(own, "bf16").save_pretrained(tmp_path / "saved")
    changed = tiny()
    changed.encoder.layer[1].extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"model: its encoder.layer.1.extra is not what BertModel makes of the config"):
        tlfast.freeze(changed, "int8").save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_fewer_blocks_than_its_configuration_says(tmp_path):
    model = tiny()
    model.encoder.layer = model.encoder.layer[:2]
    loaded = again(tlfast.freeze(model, "int8"), tmp_path / "saved")
    assert len(loaded.blocks) == 2
    assert_same(loaded(**inputs_of("bert")), tlfast.freeze(model, "int8")(**inputs_of("bert")))


def test_weights_that_are_not_finite(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"model: encoder.layer.1.output.LayerNorm.weight holds NaN or infinity"):
        tlfast.freeze(model).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_folder_of_another_model_is_left_alone(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    with pytest.raises(ValueError, match="holds a model that is not a prepared one; pass another folder"):
        tlfast.freeze(tiny(), "int8").save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == files
    with pytest.raises(ValueError, match="holds no prepared backbone"):
        FrozenBackbone.from_pretrained(tmp_path / "model")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "saved"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    old = tlfast.freeze(tiny(), "int8")
    old.save_pretrained(tmp_path / "old")
    with monkeypatch.context() as patch:
        patch.setattr("tlfast.backbone.tensor_file._bytes", full)
        for target in (folder, tmp_path / "old"):
            with pytest.raises(OSError, match="No space left on device; no backbone was saved") as error:
                tlfast.freeze(tiny(seed=1), "int8").save_pretrained(target)
            assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(target))
    assert not folder.parent.exists()
    assert_same(FrozenBackbone.from_pretrained(tmp_path / "old")(**IDS), old(**IDS))
    assert not any(path.name.startswith(".") for path in (tmp_path / "old").iterdir())


def test_a_disk_that_is_full_before_the_weights(tmp_path):
    class Tokenizer:
        def save_pretrained(self, _folder):
            raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    with pytest.raises(OSError, match="No space left on device; no backbone was saved") as error:
        tlfast.freeze(tiny(), "int8").save_pretrained(tmp_path / "saved", Tokenizer())
    assert error.value.errno == errno.ENOSPC and not (tmp_path / "saved").exists()


def test_a_folder_that_is_replaced_stays_whole_for_who_has_mapped_it(tmp_path):
    first, second = tlfast.freeze(tiny(), "int8"), tlfast.freeze(tiny(seed=1), "nf4")
    loaded = again(first, tmp_path / "saved")
    other = again(second, tmp_path / "saved")
    assert_same(loaded(**IDS), first(**IDS))
    assert_same(other(**IDS), second(**IDS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "saved"
    tlfast.freeze(wide_bert(), "int8").save_pretrained(folder)
    return folder


def edit(change, name=MANIFEST):
    def damage(folder):
        description = json.loads((folder / name).read_text())
        change(description)
        (folder / name).write_text(json.dumps(description))

    return damage


def weights(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        description = json.loads((folder / MANIFEST).read_text())
        change(tensors)
        identity = {name: str(description[name]) for name in ("format", "precision", "fingerprint")}
        save_file(tensors, folder / WEIGHTS, metadata=identity)

    return damage


def cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def of_another(folder):
    tlfast.freeze(wide_bert(num_hidden_layers=3), "int8").save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / WEIGHTS, folder)


def not_a_number(name):
    def change(tensors):
        tensors[name].view(-1)[0] = float("nan")

    return weights(change)


NORM, SCALE = "encoder.layer.1.output.LayerNorm.weight", "encoder.layer.1.output.dense.scale"
DAMAGES = {
    "no folder": (shutil.rmtree, "there is no such folder; pass one that save_pretrained or tlfast freeze wrote"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no prepared backbone (frozen.json is missing)"),
    "no JSON": (lambda f: (f / MANIFEST).write_text('{"for'), "is not JSON"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "does not describe a prepared backbone"),
    "format": (edit(lambda d: d.update(format=99)), "is of format 99 (tlfast 0.1.0), and this version reads 1"),
    "a key is missing": (edit(lambda d: d.pop("layers")), "'layers' is missing; the file is damaged"),
    "a layer without its size": (
        edit(lambda d: d["layers"]["encoder.layer.0.output.dense"].pop("inputs")),
        "frozen.json: is damaged",
    ),
    "a layer of another size": (
        edit(lambda d: d["layers"]["encoder.layer.0.output.dense"].update(inputs=512)),
        "encoder.layer.0.output.dense: its tensors are not those of int8",
    ),
    "a layer in pairs": (
        edit(lambda d: d["layers"]["encoder.layer.0.output.dense"].update(gated=True)),
        "encoder.layer.0.output.dense: gated is True, and False is what its place asks for",
    ),
    "a layer less": (
        edit(lambda d: d["layers"].pop("encoder.layer.0.output.dense")),
        "has no encoder.layer.0.output.dense.weight, which the configuration makes",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "frozen.safetensors: the file is missing"),
    "half the weights": (cut, "frozen.safetensors: is not a whole safetensors file"),
    "weights of another model": (of_another, "belongs to another backbone than frozen.json beside it"),
    "a tensor less": (weights(lambda t: t.pop(NORM)), f"{NORM} is missing, and frozen.json says F32 (128,)"),
    "a tensor more": (weights(lambda t: t.update(a=torch.zeros(2))), "a is F32 (2,), and frozen.json says missing"),
    "another shape": (
        weights(lambda t: t.update({NORM: torch.ones(5)})),
        "is F32 (5,), and frozen.json says F32 (128,)",
    ),
    "another dtype": (weights(lambda t: t.update({NORM: t[NORM].half()})), "is F16 (128,), and frozen.json says F32"),
    "NaN in a norm": (not_a_number(NORM), f"{NORM} holds NaN or infinity"),
    "NaN in a scale": (not_a_number(SCALE), f"{SCALE} holds NaN or infinity"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "cannot be read (config.json is missing)"),
    "a broken configuration": (lambda f: (f / "config.json").write_text("{"), "its configuration cannot be read"),
    "another configuration": (
        edit(lambda d: d.update(hidden_size=192, num_attention_heads=3), "config.json"),
        "and the configuration makes it",
    ),
    "a configuration of more blocks": (
        edit(lambda d: d.update(num_hidden_layers=3), "config.json"),
        "has no encoder.layer.2.",
    ),
    "a class that is not there": (
        edit(lambda d: d["model"].update({"class": "transformers.models.bert.modeling_bert.NoModel"})),
        "has no transformers.models.bert.modeling_bert.NoModel; it was saved with transformers",
    ),
    "a class from elsewhere": (edit(lambda d: d["model"].update({"class": "os.system"})), "has no os.system"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(kind, saved, tmp_path):
    damage, message = DAMAGES[kind]
    folder = shutil.copytree(saved, tmp_path / "saved")
    damage(folder)
    with pytest.raises(ValueError) as error:
        FrozenBackbone.from_pretrained(folder)
    assert message in str(error.value) and str(error.value).startswith(str(folder))
