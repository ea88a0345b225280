"""DualEncoder: the same features as transformers' own models, what learns, saving, and what is refused."""

import copy
import json

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.contrastive.two_towers import END, MODELS, Small, clip, own_features, pixels, texts
from tests.models import batch, digest, tiny
from tlfast import LadderConfig, freeze
from tlfast.contrastive import DualEncoder, TextEncoder, TowerConfig
from tlfast.contrastive.towers import TRAIN


def config(train, **settings):
    ladder = LadderConfig(reduction=2) if train == "ladder" else None
    return TowerConfig(train, ladder=ladder, **settings)


def both(model, train):
    return DualEncoder(model, None, config(train), config(train))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("train", TRAIN)
def test_it_starts_from_the_features_of_the_model(family, train):
    model, inputs = MODELS[family](), texts()
    image, text = own_features(model, inputs)
    dual = both(model, train).eval()
    torch.testing.assert_close(dual.image(pixel_values=pixels()), image)
    torch.testing.assert_close(dual.text(**inputs), text)
    torch.testing.assert_close(dual.encode_image(pixels()), F.normalize(image, dim=1))
    torch.testing.assert_close(dual.logit_scale, model.logit_scale.exp().clamp(max=100).reshape(()))
    assert dual.dim == image.shape[1]


def test_an_old_clip_ends_at_the_highest_id():
    model, inputs = clip(end=2), texts()
    torch.testing.assert_close(both(model, "nothing").text(**inputs), own_features(model, inputs)[1])


@pytest.mark.parametrize("train", TRAIN)
def test_only_what_learns_changes(train):
    model = clip()
    before = digest(model)
    dual = both(model, train).train()
    if train == "nothing":
        assert dual.trainable_parameters() == 0
        return
    optimizer = torch.optim.SGD([p for p in dual.parameters() if p.requires_grad], lr=0.1)
    start = copy.deepcopy(dual.state_dict())
    for _ in range(2):
        loss = dual(pixels(), **texts(), labels=torch.tensor([0, 1, -1])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (digest(model) != before) is (train == "full")
    changed = {name for name, tensor in dual.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {"image.head.weight", "text.head.weight"} <= changed if train == "head" else changed
    assert "loss.log_scale" in changed
    assert all(p.grad is not None for p in dual.parameters() if p.requires_grad)


def test_the_loss_is_that_of_the_embeddings():
    dual = DualEncoder(tiny("vit"), tiny("bert"), dim=20)
    inputs, labels = batch((9, 5, 12)), torch.tensor([3, 3, -1])
    found = dual(pixels(size=16), **inputs, labels=labels)
    u, v = found.image_embeds, found.text_embeds
    assert u.shape == v.shape == (3, 20)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(3))
    logits = dual.logit_scale * u @ v.T
    targets = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    wanted = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(found.loss, wanted)
    assert dual(pixels(size=16), **inputs, return_loss=False).loss is None


@pytest.mark.parametrize("image", ["vit", "deit", "dinov2", "clip-vision", "siglip-vision"])
@pytest.mark.parametrize("train", ["head", "ladder", "full"])
def test_any_vision_with_any_text_model(image, train):
    text = {"head": "roberta", "ladder": "t5-encoder", "full": "distilbert"}[train]
    dual = DualEncoder(tiny(image), tiny(text), config(train), config(train)).train()
    loss = dual(pixels(size=16), **batch((9, 5, 12))).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in dual.parameters() if p.requires_grad)


def test_features_that_are_kept_give_the_same():
    dual = DualEncoder(tiny("vit"), tiny("bert"))
    inputs = batch((9, 5, 12))
    image, text = dual.image.features(pixel_values=pixels(size=16)), dual.text.features(**inputs)
    assert dual.image.static and not image.requires_grad
    kept = dual(image_features=image, text_features=text)
    torch.testing.assert_close(kept.loss, dual(pixels(size=16), **inputs).loss)
    assert not both(clip(), "full").image.static and not both(clip(), "ladder").text.static


def test_a_frozen_module_stays_frozen_in_training():
    module = Small()
    module.dropout = torch.nn.Dropout(0.9)
    dual = DualEncoder(module, tiny("bert"), TowerConfig("head", head="mlp")).train()
    assert dual.training and not module.training and not module.dropout.training
    dual(pixels(), **batch((9, 5, 12))).loss.backward()
    assert module.convolution.weight.grad is None


def test_centred_texts_have_nothing_in_common():
    dual = DualEncoder(tiny("vit"), tiny("bert"), text_config=TowerConfig("nothing"))
    features = dual.text.features(**batch((9, 5, 12))) + 100
    dual.text.centre_on(features)
    found = dual.text.project(features)
    torch.testing.assert_close(found, F.normalize(features, dim=1) - F.normalize(features, dim=1).mean(dim=0))
    torch.testing.assert_close(found.sum(dim=0), torch.zeros(48), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"features: must be \(N, 48\)"):
        dual.text.centre_on(torch.full((2, 48), float("nan")))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_frozen_towers_in_fewer_bits(precision):
    model, inputs = clip(), texts()
    image, text = own_features(model, inputs)
    settings = TowerConfig("nothing", precision=precision)
    dual = DualEncoder(model, None, settings, settings)
    for found, wanted in ((dual.image(pixel_values=pixels()), image), (dual.text(**inputs), text)):
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found, wanted).min() > 0.99


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("train", TRAIN)
def test_saving_and_loading(tmp_path, family, train):
    model, inputs = MODELS[family](), texts()
    dual = both(model, train).train()
    if train != "nothing":
        dual(pixels(), **inputs).loss.backward()
        with torch.no_grad():
            for parameter in dual.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    dual.eval().save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert not any("frozen" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))
    loaded = DualEncoder.from_pretrained(tmp_path / "saved", None if train == "full" else model)
    torch.testing.assert_close(loaded.encode_image(pixels()), dual.encode_image(pixels()), rtol=0, atol=0)
    torch.testing.assert_close(loaded.encode_text(**inputs), dual.encode_text(**inputs), rtol=0, atol=0)
    torch.testing.assert_close(loaded.logit_scale, dual.logit_scale)


def test_one_model_of_which_one_tower_is_frozen(tmp_path):
    model = clip()
    dual = DualEncoder(copy.deepcopy(model), None, config("full"), config("nothing"))
    with torch.no_grad():
        dual.image.body.readout.projection.weight.mul_(2)
        dual.image.body.model.post_layernorm.bias.add_(1)
    dual.eval().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image: .* it was not loaded by a name"):
        DualEncoder.from_pretrained(tmp_path)
    loaded = DualEncoder.from_pretrained(tmp_path, model)
    assert torch.equal(loaded.encode_image(pixels()), dual.encode_image(pixels()))
    assert torch.equal(loaded.encode_text(**texts()), dual.encode_text(**texts()))


def test_tied_weights_are_saved_once(tmp_path):
    dual = DualEncoder(Small(), tiny("t5-encoder"), config("full"), config("full")).eval()
    model = dual.text.body.model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    with torch.no_grad():
        model.shared.weight.mul_(1.5)
    dual.save_pretrained(tmp_path)
    loaded = DualEncoder.from_pretrained(tmp_path, Small())
    assert loaded.text.body.model.shared.weight is loaded.text.body.model.encoder.embed_tokens.weight
    assert torch.equal(loaded.encode_text(**batch()), dual.encode_text(**batch()))


def test_an_architecture_that_is_no_model_is_refused(tmp_path):
    both(clip(), "full").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["image"]["architecture"]["class"] = "set_seed"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="transformers has no model 'set_seed'"):
        DualEncoder.from_pretrained(tmp_path)


def test_two_models_are_found_by_their_names(tmp_path):
    for name, family in (("image", "vit"), ("text", "bert")):
        tiny(family).save_pretrained(tmp_path / name)
    from transformers import AutoModel

    models = [AutoModel.from_pretrained(tmp_path / name) for name in ("image", "text")]
    dual = DualEncoder(*models, text_config=TowerConfig("full")).eval()
    dual.save_pretrained(tmp_path / "saved")
    loaded = DualEncoder.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode_image(pixels(size=16)), dual.encode_image(pixels(size=16)))
    assert torch.equal(loaded.encode_text(**batch()), dual.encode_text(**batch()))


def test_a_frozen_backbone_is_taken_as_it_is(tmp_path):
    backbone = freeze(tiny("bert"), precision="bf16")
    dual = DualEncoder(tiny("vit"), backbone).eval()
    assert dual.text.body.frozen.precision == "bf16"
    dual.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"text: its precision is fp32, and the model in .* was trained on bf16"):
        DualEncoder.from_pretrained(tmp_path, tiny("vit"), tiny("bert"))
    loaded = DualEncoder.from_pretrained(tmp_path, tiny("vit"), backbone)
    assert torch.equal(loaded.encode_text(**batch()), dual.encode_text(**batch()))


def test_a_tokenizer_without_a_limit():
    class Tokenizer:
        model_max_length = int(1e30)

    assert TextEncoder(DualEncoder(tiny("vit"), tiny("t5-encoder")), Tokenizer()).max_length == 1 << 20
    assert TextEncoder(DualEncoder(tiny("vit"), tiny("roberta")), Tokenizer()).max_length == 68


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DualEncoder(tiny("vit")), "text: missing, and image's ViTModel has no text tower"),
        (lambda: DualEncoder(tiny("vit"), "minilm"), "text: got a str"),
        (lambda: DualEncoder(tiny("vit"), tiny("t5")), "text: is an encoder-decoder"),
        (lambda: DualEncoder(tiny("vit"), tiny("bert"), dim=0), "dim: got 0"),
        (
            lambda: DualEncoder(clip(), tiny("bert"), TowerConfig("nothing"), TowerConfig("nothing")),
            "text: its features have 48 numbers and the shared width is 12",
        ),
        (lambda: DualEncoder(torch.nn.ReLU(), tiny("bert")), "how wide the output of ReLU is is not known"),
        (lambda: DualEncoder(Small(), tiny("bert"), TowerConfig("ladder")), "Small has no nn.ModuleList"),
        (
            lambda: DualEncoder(Small(), tiny("bert"), TowerConfig(pooling="cls")),
            "pooling: image's Small gives",
        ),
        (lambda: DualEncoder(Small(), tiny("bert"), TowerConfig(precision="int8")), "precision: image's Small"),
        (lambda: DualEncoder(clip(), image_config=TowerConfig(pooling="cls")), "pooling: image's model says itself"),
        (lambda: DualEncoder(freeze(tiny("vit")), tiny("bert"), TowerConfig("full")), "image: is frozen, and train is"),
        (lambda: DualEncoder(tiny("vit"), tiny("bert"), scale=-1.0), "scale must be in"),
        (lambda: TowerConfig("all"), "train: 'all' is not available"),
        (lambda: TowerConfig(head="deep"), "head: 'deep' is not available"),
        (lambda: TowerConfig("nothing", head="linear"), "head: a 'linear' one learns"),
        (lambda: TowerConfig("head", head="none"), "head: 'none' leaves nothing to learn"),
        (lambda: TowerConfig("full", ladder=LadderConfig()), "ladder: means nothing with train='full'"),
        (lambda: TowerConfig("full", precision="int8"), "precision: 'int8' is of frozen weights"),
        (lambda: DualEncoder(tiny("vit"), tiny("bert"), TowerConfig(pooling="best")), "pooling: 'best'"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        make()


def test_inputs_that_do_not_fit_are_refused():
    dual = DualEncoder(Small(), tiny("bert"), TowerConfig(width=11))
    with pytest.raises(ValueError, match=r"Small: gave \(3, 10\); it must give \(B, 11\)"):
        dual.encode_image(pixels())
    with pytest.raises(ValueError, match="pass one of the two"):
        dual.encode_text()
    with pytest.raises(ValueError, match=r"features: \(2, 3\); must be \(B, 48\)"):
        dual.encode_text(features=torch.zeros(2, 3))
    dual = both(clip(), "head")
    with pytest.raises(ValueError, match="image has NaN or infinity in 1 of 3 rows, the first 1"):
        dual(pixels().index_fill(0, torch.tensor([1]), float("nan")), **texts())
    with pytest.raises(ValueError, match=r"text must be \(3, 12\)"):
        dual(pixels(), **texts((4, END % 16)))


def test_damaged_folders_are_refused(tmp_path):
    model = clip()
    both(model, "head").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no clip weights, and it was not loaded by a name"):
        DualEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image: its frozen weights are not those"):
        DualEncoder.from_pretrained(tmp_path, clip(seed=1))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-9])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        DualEncoder.from_pretrained(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the file is missing"):
        DualEncoder.from_pretrained(tmp_path, model)
    described = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"kind": "ladder"}, "does not describe a dual encoder"),
        ({"format": 9}, "format 9, this version reads 1"),
        ({"image": {}}, "its image tower is not described"),
        ({"image": described["image"] | {"settings": {"train": "all"}}}, "train: 'all' is not available"),
        ({"image": described["image"] | {"settings": {"wings": 2}}}, "wings"),
        ({"image": described["image"] | {"settings": ["head"]}}, "its image tower is not described"),
        ({"image": described["image"] | {"settings": {"ladder": 3}}}, "its image tower is not described"),
        ({"text": described["text"] | {"architecture": {"config": {}}}}, "its text tower is not described"),
        ({"text": described["text"] | {"architecture": {"class": "BertModel"}}}, "its text tower is not described"),
        ({"text": described["text"] | {"architecture": "BertModel"}}, "its text tower is not described"),
        ({"max_scale": "100"}, "max_scale is '100'; the file is damaged"),
        ({"dim": None}, "dim is None; the file is damaged"),
        ({"dim": 0}, "dim is 0; the file is damaged"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(described | change))
        with pytest.raises(ValueError, match=message):
            DualEncoder.from_pretrained(tmp_path, model)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        DualEncoder.from_pretrained(tmp_path, model)
    with pytest.raises(ValueError, match="holds no saved dual encoder"):
        DualEncoder.from_pretrained(tmp_path / "nowhere", model)
