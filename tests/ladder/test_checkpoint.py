"""save_pretrained / from_pretrained: equal logits, no backbone weights, and every damaged file refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tlfast
from tests.models import batch, tiny
from tlfast import LadderConfig, LadderModel


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved ladder, and its logits on a batch."""
    torch.manual_seed(0)
    model = LadderModel(tlfast.freeze(tiny()), config=LadderConfig(reduction=2, layers=[0, 2], gate="channel")).eval()
    logits = model(**batch()).logits
    model.save_pretrained(tmp_path / "ladder")
    return tmp_path / "ladder", logits


def test_backbone_may_be_a_model_a_frozen_backbone_or_a_folder(saved, tmp_path):
    folder, logits = saved
    tiny().save_pretrained(tmp_path / "backbone")
    for backbone in (tiny(), tlfast.freeze(tiny(), taps=[1]), tmp_path / "backbone", str(tmp_path / "backbone")):
        assert torch.equal(LadderModel.from_pretrained(folder, backbone=backbone)(**batch()).logits, logits)


def test_the_folder_holds_two_files_and_no_backbone_weight(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not any("backbone" in name for name in load_file(folder / "model.safetensors"))
    description = json.loads((folder / "config.json").read_text())
    assert description["ladder"]["layers"] == [0, 2]
    assert description["backbone"]["fingerprint"] == tlfast.freeze(tiny()).fingerprint()


def test_a_lazy_ladder_stays_lazy_and_a_calibrated_one_stays_calibrated(tmp_path, saved):
    LadderModel(tlfast.freeze(tiny()), config=LadderConfig(reduction=2)).save_pretrained(tmp_path / "lazy")
    assert not LadderModel.from_pretrained(tmp_path / "lazy", backbone=tiny())._ready
    assert LadderModel.from_pretrained(saved[0], backbone=tiny())._ready


def test_a_backbone_by_name_is_read_in_float32_and_a_wrong_name_is_refused(saved, tmp_path):
    folder, _ = saved
    half = tiny().bfloat16()
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="not those the ladder"):  # loaded, and other weights than those of training
        LadderModel.from_pretrained(folder, backbone=tmp_path / "half")
    with pytest.raises(ValueError, match=r"backbone: '.*nowhere' cannot be loaded"):
        LadderModel.from_pretrained(folder, backbone=tmp_path / "nowhere")


def test_the_wrong_backbone_is_refused(saved):
    with pytest.raises(ValueError, match="not those the ladder"):
        LadderModel.from_pretrained(saved[0], backbone=tiny(seed=1))
    with pytest.raises(ValueError, match="not those the ladder"):
        LadderModel.from_pretrained(saved[0], backbone=tiny("roberta"))


def edit(**changes):
    def damage(folder):
        description = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**description, **changes}))

    return damage


def drop_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("side.norm.bias")
    save_file(weights, folder / "model.safetensors")


def widen_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    weights["side.norm.bias"] = torch.zeros(99)
    save_file(weights, folder / "model.safetensors")


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json", "missing"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors", "missing"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "not JSON"]),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "not JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "does not describe a ladder"]),
        (edit(format=99), ["format 99"]),
        (edit(ladder={"reduction": 2, "wings": 2}), ["wings", "upgrade"]),
        (edit(ladder={"layers": None}), ["layers", "damaged"]),
        (edit(ladder=[]), ["does not describe a ladder"]),
        (edit(backbone={}), ["does not describe a ladder"]),
        (truncate, ["model.safetensors", "not a whole safetensors"]),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors", "not a whole safetensors"]),
        (drop_a_tensor, ["does not fit", "side.norm.bias"]),
        (widen_a_tensor, ["does not fit", "side.norm.bias"]),
        (edit(num_labels=7), ["does not fit", "head.classifier"]),
    ],
)
def test_damaged_files_are_refused_by_name(saved, damage, words):
    folder, _ = saved
    damage(folder)
    with pytest.raises(ValueError) as caught:
        LadderModel.from_pretrained(folder, backbone=tiny())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_failing_save_leaves_the_old_ladder_and_no_partial_file(saved, monkeypatch):
    folder, logits = saved
    model = LadderModel.from_pretrained(folder, backbone=tiny())
    with torch.no_grad():
        model.head.classifier.bias.add_(1)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlfast.backbone.trained_folder.save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(LadderModel.from_pretrained(folder, backbone=tiny())(**batch()).logits, logits)


def test_the_backbone_may_be_a_prepared_folder_and_has_the_precision_of_training(tmp_path):
    backbone = tlfast.freeze(tiny(), "int8")
    ladder = LadderModel(backbone, config=LadderConfig(reduction=2)).eval()
    logits = ladder(**batch()).logits
    ladder.save_pretrained(tmp_path / "ladder")
    backbone.save_pretrained(tmp_path / "prepared")
    for given in (tmp_path / "prepared", str(tmp_path / "prepared"), tiny(), backbone):
        assert torch.equal(LadderModel.from_pretrained(tmp_path / "ladder", backbone=given)(**batch()).logits, logits)
    message = r"its precision is bf16, and the ladder in .* was trained on int8; pass freeze\(model, precision='int8'\)"
    with pytest.raises(ValueError, match=message):
        LadderModel.from_pretrained(tmp_path / "ladder", backbone=tlfast.freeze(tiny(), "bf16"))
    tlfast.freeze(tiny(seed=1), "int8").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not those the ladder"):
        LadderModel.from_pretrained(tmp_path / "ladder", backbone=tmp_path / "other")
