"""tlfast klite zeroshot, train and eval: tables, JSON, files, resuming, and what they refuse."""

import csv
import json
import os
import signal
from itertools import pairwise

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from PIL import Image
from typer.testing import CliRunner

from tests.cli.klite_runs import write_all
from tests.cli.ladder_runs import refused
from tests.knowledge.small_wordnet import offset_of
from tlfast.cli import app
from tlfast.contrastive import DualEncoder
from tlfast.contrastive.texts import TextBank

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("klite"))


@pytest.fixture(autouse=True)
def wordnet(data, monkeypatch):
    monkeypatch.setenv("TLFAST_WORDNET", str(data / "wordnet"))


def run(*arguments):
    return CliRunner().invoke(app, ["klite", *map(str, arguments)], catch_exceptions=False)


def result_of(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def two_models(data):
    return "--backbone", data / "vit", "--text-backbone", data / "bert"


def train(data, out, *more):
    sizes = ("--epochs", 3, "--batch-size", 8, "--lr", "1e-2")
    return "train", "--train", data / "train", "--dev", data / "dev", "--out", out, *sizes, *more


def test_zeroshot(data, tmp_path):
    arguments = ("zeroshot", "--backbone", data / "clip", "--data", data / "test", "--dev", data / "dev")
    found = result_of(*arguments)
    assert (found["images"], found["classes"], found["covered"], found["dictionary"]) == (24, 4, 3, "WordNet")
    assert set(found["scores"]) == {"name", "knowledge", "blend"}
    assert found["scores"]["blend"]["weight"] == found["dev"]["weight"]
    assert found["dev"]["accuracies"][f"{found['dev']['weight']:g}"] == max(found["dev"]["accuracies"].values())
    result = run(*arguments, "--out", tmp_path / "rows.csv")
    assert "3 of 4 classes are in WordNet" in result.stdout and "24 predictions are in" in result.stdout
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    right = sum(row["prediction"] == row["file"].split("/")[-2] for row in rows) / 24
    assert right == pytest.approx(found["scores"]["blend"]["accuracy"])
    alone = result_of(*arguments[:5], "--no-knowledge")
    assert alone["scores"] == {"name": found["scores"]["name"]} and alone["dictionary"] is None


def test_zeroshot_of_images_without_labels(data, tmp_path):
    (tmp_path / "names.txt").write_text("red kite\nseal\nshark\n")
    arguments = ("zeroshot", "--backbone", data / "clip", "--data", data / "flat", "--classes", tmp_path / "names.txt")
    found = result_of(*arguments)
    assert "scores" not in found and len(found["predictions"]) == 6
    assert {row["prediction"] for row in found["predictions"]} <= {"red kite", "seal", "shark"}
    assert len(run(*arguments).stdout.splitlines()) == 7


def test_labels_that_are_wordnet_ids_are_read_as_words(data, tmp_path, monkeypatch):
    for source, name in (("seal", f"n{offset_of('shark'):08d}"), ("red_kite", f"n{offset_of('kite_bird'):08d}")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for file in (data / "test" / source).iterdir():
            (tmp_path / "images" / name / file.name).write_bytes(file.read_bytes())
    read = []
    monkeypatch.setattr("tlfast.knowledge.embed_classes", lambda prompts, encode: read.extend(prompts) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("zeroshot", "--backbone", data / "clip", "--data", tmp_path / "images")
    assert sorted(prompt.names[0] for prompt in read) == ["a photo of a kite.", "a photo of a shark."]
    assert all("n0" not in text for prompt in read for texts in prompt.knowledge for text in texts)
    (tmp_path / "names.tsv").write_text(
        "label\tname\nred_kite\tmouse\nseal\tturtle\ngreen_crane\thawk\nblue_mouse\tax\n"
    )
    del read[:]
    with pytest.raises(ZeroDivisionError):
        run("zeroshot", "--backbone", data / "clip", "--data", data / "test", "--names", tmp_path / "names.tsv")
    assert [prompt.name for prompt in read] == ["ax", "hawk", "mouse", "turtle"]


def test_numbers_are_labels_as_they_are_written(data, tmp_path):
    for source, name in (("seal", "10"), ("red_kite", "02")):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).symlink_to(data / "test" / source)
    (tmp_path / "names.tsv").write_text("label\tname\n02\tkite\n10\tseal\n")
    arguments = ("zeroshot", "--backbone", data / "clip", "--data", tmp_path / "images")
    assert result_of(*arguments, "--no-knowledge")["images"] == 12
    found = result_of(*arguments, "--names", tmp_path / "names.tsv", "--out", tmp_path / "rows.jsonl")
    assert found["covered"] == 1
    assert {json.loads(line)["prediction"] for line in (tmp_path / "rows.jsonl").open()} <= {"02", "10"}


@pytest.mark.parametrize(
    ("models", "more"),
    [
        ("two", ("--image-train", "head", "--text-train", "nothing", "--centre-texts")),
        ("two", ("--image-train", "ladder", "--reduction", 2, "--text-train", "head", "--head", "mlp", "--dim", 20)),
        ("clip", ("--image-train", "full", "--text-train", "nothing", "--choice", "nearest")),
        ("clip", ("--image-train", "full", "--text-train", "full", "--no-knowledge")),
    ],
)
def test_train_and_eval(data, tmp_path, models, more):
    given = two_models(data) if models == "two" else ("--backbone", data / "clip")
    found = result_of(*train(data, tmp_path / "run", *given, "--test", data / "test", *more))
    assert found["accuracy"] == (found["test"].get("blend") or found["test"]["name"])["accuracy"] > 0.5
    assert found["dev"]["n"] == 16 and found["examples"] == {"train": 48, "dev": 16}
    assert len(found["epoch_seconds"]) == 3 and found["saved_bytes_per_sample"] > 0
    assert found["features_made_once"] == (
        ["image", "text"] if "--centre-texts" in more else [] if "--no-knowledge" in more else ["text"]
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == found
    with Image.open(tmp_path / "run" / "curve.png") as picture:
        assert picture.size[0] > 500
    known = ("--no-knowledge",) if "--no-knowledge" in more else ("--dev", data / "dev")
    known += ("--choice", "nearest") if "nearest" in more else ()
    scored = result_of("eval", "--model", tmp_path / "run", "--data", data / "test", *known)
    assert scored["zeroshot"] == found["test"]


def test_another_backbone_is_refused(data, tmp_path):
    result_of(*train(data, tmp_path / "run", *two_models(data), "--epochs", 1))
    other = ("--backbone", data / "clip")
    refused(run("eval", "--model", tmp_path / "run", "--data", data / "test", *other), "image: its frozen weights are")


def test_probe_and_few_shots(data):
    pytest.importorskip("sklearn")
    arguments = ("eval", "--backbone", data / "clip", "--data", data / "test", "--train", data / "train")
    found = result_of(*arguments, "--shots", "1,4,16", "--seeds", 2)
    assert found["linear_probe"]["accuracy"] > 0.5 and found["linear_probe"]["n"] == 48 - 5
    assert [row["shots"] for row in found["few_shot"]] == [1, 4, 16] and found["few_shot"][2]["missing"] == 10
    assert len(found["few_shot"][0]["accuracies"]) == 2
    shown = run(*arguments, "--dev", data / "dev", "--shots", "4,16").stdout
    assert "probe      accuracy" in shown and "  4 shots  accuracy" in shown and "a class has only 12 images" in shown


def test_captions(data, tmp_path):
    captions = data / "captions.jsonl"
    sizes = ("--epochs", 2, "--batch-size", 8)
    given = ("train", "--train", captions, "--test", captions, "--out", tmp_path / "run", *two_models(data), *sizes)
    found = result_of(*given)
    assert found["captions"] == 4 and found["captions_covered"] == 4 and found["classes"] == 0
    assert set(found["test"]) == {"image_to_text", "text_to_image"} and "accuracy" not in found
    scored = result_of("eval", "--model", tmp_path / "run", "--data", captions)
    assert scored["retrieval"] == found["test"]
    assert "nouns of 4 of 4 captions are in WordNet" in run(*given, "--resume").stdout


def test_classes_and_captions_together(data, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (data / "captions.jsonl").open()]
    for number, row in enumerate(rows):
        row["image"] = str(data / row["image"])
        label = row["image"].split("/")[-2]
        if number % 3:
            row["label"] = label
        if number % 3 == 2:
            del row["caption"]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    banks = []
    made = TextBank.__init__
    monkeypatch.setattr(TextBank, "__init__", lambda self, *given: (made(self, *given), banks.append(self))[0])
    result_of(*train(data, tmp_path / "run", *two_models(data), "--train", tmp_path / "mixed.jsonl"))
    labels = [(group.label, group.plain[0]) for group in banks[0].groups]
    assert [label for label, _ in labels] == [0, 1, 2, 3, 4, 0, 6, 1, 8, 2, 10, 3]
    assert labels[4][1] == labels[5][1] == "the blue mouse is a good bird"


def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch):
    arguments = (*train(data, tmp_path / "run", *two_models(data)), "--test", data / "test")
    whole = result_of(*train(data, tmp_path / "whole", *two_models(data)), "--test", data / "test")
    drawn, steps = TextBank.draw, []

    def draw(self, groups):
        steps.append(1)
        if len(steps) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return drawn(self, groups)

    monkeypatch.setattr(TextBank, "draw", draw)
    result = run(*arguments)
    assert result.exit_code == 130 and "add" not in result.stdout
    assert result.stderr.splitlines()[-1] == "interrupted; run the same command with --resume to go on"
    refused(run(*arguments), "already holds a run")
    refused(run(*arguments, "--resume", "--knowledge-share", 0.25), "was started with knowledge=")
    found = result_of(*arguments, "--resume")
    assert len(steps) == 18 + 1  # the cost of a step is measured at the end
    assert found["test"] == whole["test"] and found["dev"] == whole["dev"]
    first, second = (DualEncoder.from_pretrained(tmp_path / name, *models(data)) for name in ("run", "whole"))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    refused(run(*arguments[:-1], data / "dev", "--resume"), "is finished, with another test file")


def test_the_folder_of_another_command_is_refused(data, tmp_path):
    arguments = train(data, tmp_path / "run", *two_models(data), "--epochs", 1)
    result_of(*arguments)
    for name in ("metrics.json", "run.json"):
        path = tmp_path / "run" / name
        if path.exists():
            kept = json.loads(path.read_text())
            kept.pop("test_sha256", None)
            path.write_text(json.dumps(kept).replace("klite train", "train"))
    refused(run(*arguments, "--resume"), "was started with command=")


def test_what_cannot_train_is_refused_before_images_are_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.contrastive.training.prepare", lambda *given: 1 / 0)
    given = ("--backbone", data / "clip")
    nothing = ("--image-train", "nothing", "--text-train", "nothing")
    refused(run(*train(data, tmp_path / "run", *given, *nothing)), "nothing learns in either tower")
    learning = ("--text-train", "full", "--centre-texts")
    refused(run(*train(data, tmp_path / "run", *given, *learning)), "--centre-texts: the text tower learns")


def models(data):
    from transformers import AutoModel

    return AutoModel.from_pretrained(data / "vit"), AutoModel.from_pretrained(data / "bert")


REFUSED = [
    ("zeroshot", [], "--backbone: is missing"),
    ("zeroshot", ["--backbone", "vit"], "a vit model does not read both images and texts; pass a CLIP"),
    ("zeroshot", ["--backbone", "bert"], "a bert model does not read both images and texts"),
    ("zeroshot", ["--model", "clip"], "holds no trained model (klite.json is missing)"),
    ("zeroshot", ["--model", "nowhere"], "there is no such folder"),
    ("zeroshot", ["--backbone", "clip", "--data", "nowhere"], "nowhere: there is no such folder or file"),
    ("zeroshot", ["--backbone", "clip", "--data", "one"], "there is only the class 'seal'"),
    ("zeroshot", ["--backbone", "clip", "--data", "hollow"], "hollow/b: there are no images in it"),
    ("zeroshot", ["--backbone", "clip", "--data", "broken"], "broken/b/0.png: the image is broken"),
    ("zeroshot", ["--backbone", "clip", "--data", "cut"], "cut/b/0.png: the image is broken"),
    ("zeroshot", ["--backbone", "clip", "--data", "flat"], "its images have no labels; pass the candidates"),
    ("zeroshot", ["--backbone", "clip", "--data", "images.tsv"], "images.tsv, line 3: there is no image"),
    ("zeroshot", ["--backbone", "clip", "--data", "columns.tsv"], "there is no column 'label' and no column 'caption'"),
    ("zeroshot", ["--backbone", "clip", "--data", "empty.tsv"], "line 2: has neither a label nor a caption"),
    ("zeroshot", ["--backbone", "clip", "--dev", "others"], "the label 'b' is not among the 4 classes of"),
    ("zeroshot", ["--backbone", "clip", "--wordnet", "nowhere"], "run apt-get install wordnet-base"),
    ("zeroshot", ["--backbone", "clip", "--no-knowledge", "--wordnet", "auto"], "--wordnet: is not read with"),
    (
        "zeroshot",
        ["--backbone", "clip", "--no-knowledge", "--dev", "others"],
        "--dev: chooses how much knowledge counts",
    ),
    ("zeroshot", ["--backbone", "clip", "--choice", "best"], "--choice 'best': is not available"),
    ("zeroshot", ["--backbone", "clip", "--names", "names.tsv"], "has no name for the label 'blue_mouse'"),
    ("zeroshot", ["--backbone", "clip", "--out", "rows.xml"], "the extension '.xml' is not known"),
    ("eval", ["--backbone", "clip", "--shots", "1,x"], "--shots '1,x': pass numbers"),
    ("eval", ["--backbone", "clip", "--train", "others"], "the label 'b' is not among the 4 classes of"),
    ("train", ["--backbone", "vit"], "a vit model does not read both images and texts; add --text-backbone"),
    ("train", ["--backbone", "./none"], "there is no such folder"),
    ("train", ["--backbone", "clip", "--train", "one"], "there is only the class 'seal'"),
    ("train", ["--backbone", "clip", "--train", "flat"], "training images need classes or captions"),
    ("train", ["--backbone", "clip", "--dev", "others"], "the label 'b' is not among the 4 classes"),
    ("train", ["--backbone", "clip", "--test", "nowhere"], "nowhere: there is no such file or folder"),
    ("train", ["--backbone", "clip", "--image-train", "all"], "train: 'all' is not available"),
    ("train", ["--backbone", "clip", "--head", "deep"], "head: 'deep' is not available"),
    ("train", ["--backbone", "clip", "--lr", "x"], "--lr 'x'"),
    ("train", ["--backbone", "clip", "--image-train", "ladder"], "reduction: 8 does not divide"),
    (
        "train",
        ["--backbone", "clip", "--image-train", "nothing", "--text-train", "nothing"],
        "nothing learns in either",
    ),
    (
        "train",
        ["--backbone", "clip", "--text-train", "full", "--centre-texts"],
        "--centre-texts: the text tower learns",
    ),
    ("train", ["--backbone", "clip", "--templates", "none.txt"], "--templates none.txt: there is no such file"),
    ("train", ["--backbone", "clip", "--train", "captions.tsv", "--names", "none.tsv"], "--names none.tsv: there is"),
    ("train", ["--backbone", "clip", "--precision", "fp4"], "precision: 'fp4' is not available"),
]


@pytest.mark.parametrize(("command", "options", "message"), REFUSED)
def test_what_is_refused(data, tmp_path, monkeypatch, command, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("clip", "vit", "bert", "flat"):
        (tmp_path / name).symlink_to(data / name)
    seal = (data / "test" / "seal" / "0.png").read_bytes()
    for folder in (
        "one/seal",
        "hollow/a",
        "hollow/b",
        "broken/a",
        "broken/b",
        "cut/a",
        "cut/b",
        "others/a",
        "others/b",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.png").write_bytes(seal)
    (tmp_path / "hollow" / "b" / "0.png").unlink()
    (tmp_path / "broken" / "b" / "0.png").write_bytes(b"no image")
    (tmp_path / "cut" / "b" / "0.png").write_bytes(seal[: len(seal) // 2])
    (tmp_path / "others" / "a").rename(tmp_path / "others" / "seal")
    (tmp_path / "images.tsv").write_text("image\tlabel\none/seal/0.png\ta\none/seal/1.png\tb\n")
    (tmp_path / "columns.tsv").write_text("image\tclass\none/seal/0.png\ta\n")
    (tmp_path / "captions.tsv").write_text("image\tcaption\n" + "one/seal/0.png\ta seal\n" * 12)
    (tmp_path / "empty.tsv").write_text("image\tlabel\none/seal/0.png\t\n")
    (tmp_path / "names.tsv").write_text("label\tname\nseal\tseal\n")
    given = {"--data": data / "test"} if command != "train" else {"--train": data / "train", "--out": "run"}
    given |= {option: value for option, value in pairwise(options) if option in given}
    rest = [part for i, part in enumerate(options) if part not in given and (not i or options[i - 1] not in given)]
    refused(run(command, *(part for pair in given.items() for part in pair), *rest), message)
    assert not (tmp_path / "run").exists()
