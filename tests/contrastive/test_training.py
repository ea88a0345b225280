"""Training a dual encoder: it learns, draws texts as it should, keeps features, and resumes exactly."""

import os
import signal

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertTokenizer

from tests.contrastive import pictures
from tests.contrastive.two_towers import Small, siglip
from tests.models import tiny
from tlfast import LadderConfig
from tlfast.contrastive import DualEncoder, TextEncoder, TowerConfig, embed_images, texts, training
from tlfast.contrastive.texts import TextBank, TextGroup
from tlfast.data import InputError, read_image_texts
from tlfast.training import InterruptedTraining, Settings, evaluation

TOKENS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of red kite green crane blue mouse seal bird rodent , ; ."
NAMES = tuple(pictures.COLOURS)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text(TOKENS.replace(" ", "\n") + "\n")
    return BertTokenizer(str(path), model_max_length=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [read_image_texts(pictures.class_folders(folder / str(seed), 8, seed)) for seed in range(2)]


def groups():
    known = {"red kite": "bird", "blue mouse": "rodent"}
    return [
        TextGroup(i, (name, f"a photo of a {name}"), (f"{name} ; {known[name]}",) if name in known else ())
        for i, name in enumerate(sorted(name.replace(" ", "_") for name in NAMES))
        for name in [name.replace("_", " ")]
    ]


def pairs(images):
    order = sorted(set(images.labels))
    return training.Pairs(images.files, [order.index(label) for label in images.labels])


def make(image=None, train="full", text_train="head"):
    torch.manual_seed(0)
    image = Small() if image is None else image
    ladder = LadderConfig(reduction=2) if train == "ladder" else None
    return DualEncoder(image, tiny("bert", 1), TowerConfig(train, ladder=ladder), TowerConfig(text_train), dim=16)


def prepared(tokenizer, data, make=make, share=0.5):
    dual = make()
    bank = TextBank(groups(), share)
    return training.prepare(
        dual, bank, TextEncoder(dual, tokenizer), pictures.Processor(), pairs(data[0]), pairs(data[1]), len(NAMES)
    )


def settings(**changed):
    return Settings(**{"epochs": 4, "batch_size": 8, "learning_rates": (3e-2,), "seed": 3, **changed})


def test_it_learns(tokenizer, data, tmp_path):
    ready = prepared(tokenizer, data)
    assert ready.kept == ("text",)
    lines = []
    fit = training.train_pairs(make, ready, settings(epochs=8), tmp_path / "run", report=lines.append)
    assert fit.dev["accuracy"] > 0.9 and fit.dev["top5"] == 1 and fit.dev["n"] == 32
    assert len(lines) == 8 and "dev accuracy" in lines[0]
    dual = fit.model.dual
    classes = fit.model.class_embeddings()
    nearest = (embed_images(dual, data[1].files, pictures.Processor()) @ classes.T).argmax(dim=1)
    assert float((nearest == torch.tensor(pairs(data[1]).groups)).float().mean()) == fit.dev["accuracy"]
    assert not any("frozen" in name for name in fit.model.state_dict())


@pytest.mark.parametrize("train", ["head", "ladder", "full"])
def test_transformers_towers_are_trained(tokenizer, data, tmp_path, train):
    def make_vit():
        return make(tiny("vit", image_size=8), train, train if train != "ladder" else "head")

    ready = prepared(tokenizer, data, make_vit)
    assert ready.kept == {"head": ("image", "text"), "ladder": ("text",), "full": ()}[train]
    fit = training.train_pairs(make_vit, ready, settings(learning_rates=(3e-3,)), tmp_path / "run")
    losses = [entry["loss"] for entry in fit.chosen.history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_kept_features_train_the_same_model(tokenizer, data, tmp_path, monkeypatch):
    def make_vit():
        return make(tiny("vit", image_size=8), "head")

    kept = training.train_pairs(make_vit, prepared(tokenizer, data, make_vit), settings(), tmp_path / "kept")
    for module in (texts, training):
        monkeypatch.setattr(module, "FEATURE_BYTES", 0)
    ready = prepared(tokenizer, data, make_vit)
    assert ready.kept == ()
    fresh = training.train_pairs(make_vit, ready, settings(), tmp_path / "fresh")
    assert kept.dev == pytest.approx(fresh.dev, rel=1e-4)
    for name, tensor in kept.model.state_dict().items():
        torch.testing.assert_close(tensor, fresh.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", ["full", "head", "ladder"])
def test_a_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(tokenizer, data, tmp_path, train):
    def make_this():
        return make(Small() if train == "full" else tiny("vit", image_size=8), train)

    ready = prepared(tokenizer, data, make_this)
    whole = training.train_pairs(make_this, ready, settings(), tmp_path / "whole")
    drawn = ready.bank.draw
    steps = []

    def draw(labels):
        steps.append(1)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return drawn(labels)

    ready.bank.draw = draw
    with pytest.raises(InterruptedTraining):
        training.train_pairs(make_this, ready, settings(), tmp_path / "cut")
    assert len(steps) == 6
    resumed = training.train_pairs(make_this, ready, settings(), tmp_path / "cut", resume=True)
    assert len(steps) == 16
    assert resumed.dev == whole.dev
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_tied_weights_are_trained_and_resumed(tokenizer, data, tmp_path):
    def make_t5():
        torch.manual_seed(0)
        return DualEncoder(Small(), tiny("t5-encoder"), TowerConfig("full"), TowerConfig("full"), dim=16)

    ready = prepared(tokenizer, data, make_t5)
    fit = training.train_pairs(make_t5, ready, settings(epochs=2), tmp_path / "run")
    again = training.train_pairs(make_t5, ready, settings(epochs=2), tmp_path / "run", resume=True)
    assert again.dev == fit.dev
    for name, tensor in fit.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


class Normed(Small):
    """With running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, given):
        return super().forward(self.norm(given))


def test_what_is_saved_is_what_was_scored(tokenizer, data, tmp_path):
    pytest.importorskip("typer")
    from tlfast.cli.klite_train import _cost

    def make_normed():
        return make(Normed())

    ready = prepared(tokenizer, data, make_normed)
    fit = training.train_pairs(make_normed, ready, settings(epochs=1), tmp_path / "run")
    before = {name: tensor.clone() for name, tensor in fit.model.state_dict().items()}
    assert _cost(fit, ready, 8)["saved_bytes_per_sample"] > 0
    assert "dual.image.body.module.norm.running_mean" in before
    for name, tensor in fit.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_processes_share_the_statistics_of_what_is_trained(tokenizer):
    dual, frozen = make(Normed()), make(Normed(), "head")
    for each, ignored in ((dual, False), (frozen, True)):
        model = training.PairModel(each, TextBank(groups()), TextEncoder(each, tokenizer), 4)
        statistics = [name for name, _ in model.named_buffers() if name.endswith("running_mean")]
        assert len(statistics) == 1
        assert (statistics[0] in model._ddp_params_and_buffers_to_ignore) is ignored


def test_candidates_are_encoded_once_a_dev_evaluation(tokenizer, data, tmp_path, monkeypatch):
    ready = prepared(tokenizer, data)
    model = training.PairModel(make(), ready.bank, ready.encoder, ready.candidates).train()
    encoded = []
    found = TextBank.encode
    monkeypatch.setattr(TextBank, "encode", lambda *given: encoded.append(1) or found(*given))
    monkeypatch.setattr(evaluation, "_BATCH_SIZE", 8)
    scores = evaluation.evaluate(model, ready.data.dev, ready.data.collate, ready.data.scoring)
    assert scores["n"] == 32 and len(encoded) == 1 and model.training


def test_texts_are_drawn_by_the_share_and_the_generator():
    bank = TextBank(groups(), 0.5)
    torch.manual_seed(5)
    drawn = bank.draw(torch.tensor([0] * 400 + [1] * 400 + [3] * 400))
    torch.manual_seed(5)
    assert bank.draw(torch.tensor([0] * 400 + [1] * 400 + [3] * 400)) == drawn
    kinds = {text: drawn.count(text) for text in set(drawn)}
    assert 160 < kinds["blue mouse ; rodent"] < 240 and 70 < kinds["a photo of a blue mouse"] < 130
    assert kinds["green crane"] + kinds["a photo of a green crane"] == 400 and len(kinds) == 7
    assert set(TextBank(groups(), 1).draw(torch.tensor([0] * 50))) == {"blue mouse ; rodent"}
    assert "blue mouse ; rodent" not in TextBank(groups(), 0).draw(torch.tensor([0] * 50))
    assert TextBank(groups(), 1).standing_for(1) == ("green crane", "a photo of a green crane")
    assert len(bank.standing_for(0)) == 3 and len(TextBank(groups(), 0).standing_for(0)) == 2


def test_the_loss_knows_which_labels_agree(tokenizer, data):
    """Captions, label -1, belong to their own image alone."""
    bank = TextBank([*groups(), TextGroup(-1, ("a bird",)), TextGroup(-1, ("a rodent",))], 0)
    dual = make()
    model = training.PairModel(dual, bank, TextEncoder(dual, tokenizer), 4).train()
    chosen = torch.tensor([4, 5, 2, 2])
    found = {}
    dual.loss.register_forward_pre_hook(lambda _module, given: found.update(zip("uvl", given, strict=True)))
    model(chosen, pixel_values=torch.randn(4, 3, 8, 8))
    assert found["l"].tolist() == [-1, -1, 2, 2]
    torch.testing.assert_close(found["v"][:1], TextEncoder(dual, tokenizer)(["a bird"]))


def test_siglip_reads_texts_padded_as_it_was_trained(tokenizer):
    model = siglip()
    dual = DualEncoder(model)
    found = TextEncoder(dual, tokenizer, batch_size=2)(["a red kite", "a photo of a blue mouse ; rodent", "seal"])
    ids = tokenizer(["seal"], padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model.get_text_features(input_ids=ids)
    torch.testing.assert_close(found[2:], F.normalize(getattr(wanted, "pooler_output", wanted), dim=1))


def test_scores_count_ties_against_the_image():
    logits = torch.tensor([[3.0, 1, 2, 0, 0, 0], [1.0, 1, 0, 0, 0, 0], [0.0, 5, 4, 3, 2, 1]])
    labels = torch.tensor([0, 0, 0])
    kept = training.CandidateScoring().reduce(logits, labels)
    assert kept[:, :2].tolist() == [[1, 1], [0, 1], [0, 0]]
    torch.testing.assert_close(kept[:, 2], F.cross_entropy(logits, labels, reduction="none"))
    scores = training.CandidateScoring().score(kept.numpy(), labels.tolist())
    assert scores["accuracy"] == pytest.approx(1 / 3) and scores["top5"] == pytest.approx(2 / 3)


def test_what_is_refused(tokenizer, data, tmp_path):
    with pytest.raises(ValueError, match=r"knowledge_share: 1\.5 must be in"):
        TextBank(groups(), 1.5)
    with pytest.raises(ValueError, match="groups: the one at 1 has no text"):
        TextBank([TextGroup(0, ("a",)), TextGroup(1, ())])
    ready = prepared(tokenizer, data)
    dual, bank = make(), TextBank(groups())
    one = training.Pairs(data[0].files[:2], [0, 0])
    arguments = (bank, TextEncoder(dual, tokenizer), pictures.Processor())
    with pytest.raises(InputError, match="there is only one class or caption"):
        training.prepare(dual, *arguments, one, one, 1)
    with pytest.raises(ValueError, match="dev: the group 3 is not one of the 2"):
        training.prepare(dual, *arguments, one, training.Pairs(data[0].files[:1], [3]), 2)

    def nothing_learns():
        return DualEncoder(tiny("vit"), tiny("bert"), TowerConfig("nothing"), TowerConfig("nothing"))

    with pytest.raises(InputError, match="nothing learns in either tower"):
        training.train_pairs(nothing_learns, ready, settings(), tmp_path / "run")


def test_weights_that_are_not_finite_are_found(tokenizer, data):
    dual = make(tiny("vit", image_size=8), "head")
    with torch.no_grad():
        next(dual.image.body.frozen.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"0\.png: the image tower makes NaN or infinity of it"):
        embed_images(dual, data[0].files, pictures.Processor())
    with torch.no_grad():
        next(dual.text.body.frozen.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="text: the tower makes NaN or infinity of 'blue mouse'"):
        TextBank(groups()).keep_features(TextEncoder(dual, tokenizer))
