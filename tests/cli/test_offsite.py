"""tlfast offsite: two parties, and what each is refused in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import torch
import transformers
from typer.testing import CliRunner

from tests.cli.ladder_runs import save_backbone, write_sentences
from tests.cli.task_runs import save_gpt2, save_vit, write_colours, write_counting
from tests.offsite.test_adapter_security import of_bundle
from tlfast.cli import app, offsite_model

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return CliRunner().invoke(app, ["offsite", *map(str, arguments)], catch_exceptions=False)


def done(*arguments):
    """The JSON of a command that ended well."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) == 1
    return json.loads(result.stdout)


def refused(*arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The owner's model and bundle, the other's data, a run on them, and the plugged model."""
    folder = tmp_path_factory.mktemp("offsite")
    save_backbone(folder / "model", blocks=5)
    write_sentences(folder / "train.tsv", 400, 1)
    write_sentences(folder / "test.tsv", 60, 2)
    done("make", "--model", folder / "model", "--adapter", "1,1", "--emulator", "keep:2", "--out", folder / "bundle")
    metrics = train(folder, "run", "--epochs", 5)
    done("plug", "--model", folder / "model", "--adapter", folder / "run", "--out", folder / "plugged")
    return folder, metrics


def train(folder, out, *more, bundle="bundle"):
    data = ("--train", folder / "train.tsv", "--test", folder / "test.tsv", "--lr", "3e-3")
    return done("train", folder / bundle, *data, "--out", folder / out, *more)


def test_both_learn_and_the_plugged_model_loads_by_transformers_alone(world):
    folder, metrics = world
    assert metrics["accuracy"] > 0.8, "the emulator learned"
    assert metrics["settings"]["method"]["name"] == "full" and metrics["saved_bytes_per_sample"] > 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "plugged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "plugged")
    rows = [line.split("\t") for line in (folder / "test.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        logits = model(**tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")).logits
    right = [model.config.id2label[i] == label for i, (_, label) in zip(logits.argmax(1).tolist(), rows, strict=True)]
    assert sum(right) / len(right) > 0.8


def test_only_one_folder_goes_back_and_the_run_keeps_the_rest(world):
    folder, metrics = world
    assert sorted(path.name for path in (folder / "run" / "adapter").iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
    ]
    assert json.loads((folder / "run" / "metrics.json").read_text()) == metrics
    assert (folder / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    sent = (folder / "run" / "adapter" / "manifest.json").read_text()
    assert "train.tsv" not in sent and "accuracy" not in sent and str(folder) not in sent
    assert str(folder) not in (folder / "bundle" / "manifest.json").read_text()


@pytest.mark.parametrize("method", ["lora", "ladder"])
def test_other_methods(world, method, tmp_path):
    folder, _ = world
    metrics = train(folder, tmp_path / "run", "--method", method, "--reduction", 4, "--epochs", 2)
    result = done(
        "plug", "--model", folder / "model", "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "p"
    )
    assert metrics["settings"]["method"]["name"] == result["method"] == method
    assert result["class"] == {"lora": "BertForSequenceClassification", "ladder": "LadderModel"}[method]


WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"{event}: {arguments}")
    if event == "open" and isinstance(arguments[0], str) and "owner" in os.path.abspath(arguments[0]).split(os.sep):
        raise RuntimeError(f"opened {arguments[0]}")

sys.addaudithook(watch)
from tlfast.cli import main
sys.argv[0] = "tlfast"
main()
"""


def test_training_needs_the_bundle_and_nothing_else(world, tmp_path):
    """A process of its own, in which the full model's folder does not exist; no file of its owner is opened."""
    folder, metrics = world
    (tmp_path / "theirs").mkdir()
    for name in ("bundle", "train.tsv", "test.tsv"):
        (shutil.copytree if name == "bundle" else shutil.copy)(folder / name, tmp_path / "theirs" / name)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "theirs"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    arguments = ["train", "bundle", "--train", "train.tsv", "--test", "test.tsv", "--lr", "3e-3", "--epochs", "5"]
    moved = (folder / "model").rename(tmp_path / "owner")
    try:
        outcome = subprocess.run(
            [sys.executable, "-c", WATCH, "offsite", *arguments, "--out", "run", "--json"],
            cwd=tmp_path / "theirs", env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    finally:
        moved.rename(folder / "model")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["test"] == metrics["test"]
    same = [path / "adapter" / "adapter.safetensors" for path in (folder / "run", tmp_path / "theirs" / "run")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_a_language_model(tmp_path):
    save_gpt2(tmp_path / "model", blocks=4)
    write_counting(tmp_path / "train.txt", 300, 1)
    write_counting(tmp_path / "test.txt", 40, 2)
    distil = ("--distill", tmp_path / "train.txt", "--steps", 5)
    made = done(
        "make",
        "--model",
        tmp_path / "model",
        "--adapter",
        "1,1",
        "--emulator",
        "svd:4",
        "--out",
        tmp_path / "b",
        *distil,
    )
    assert made["middle"] == [1, 2]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["emulator"]["distilled"]["steps"] == 5
    data = ("--train", tmp_path / "train.txt", "--test", tmp_path / "test.txt", "--task", "causal-lm", "--lr", "3e-3")
    metrics = done("train", tmp_path / "b", *data, "--out", tmp_path / "run", "--epochs", 3)
    assert metrics["test"]["perplexity"] < 9
    done("plug", "--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "plugged")
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plugged")).__name__ == "GPT2LMHeadModel"


def test_multiple_choice(tmp_path):
    """Which number comes next? A language model answers by what it finds likely."""
    save_gpt2(tmp_path / "model", blocks=4)
    for name, count in (("train", 200), ("test", 40)):
        rows = [f"{i % 8} {i % 8 + 1}\t{(i * 7) % 10}\t{i % 8 + 2}\t1" for i in range(count)]
        rows = [row for row in rows if row.split("\t")[1] != row.split("\t")[2]]
        (tmp_path / f"{name}.tsv").write_text("text\tchoice_0\tchoice_1\tlabel\n" + "\n".join(rows) + "\n")
    done("make", "--model", tmp_path / "model", "--adapter", "1,1", "--emulator", "keep:1", "--out", tmp_path / "b")
    data = ("--train", tmp_path / "train.tsv", "--test", tmp_path / "test.tsv")
    training = (*data, "--task", "multiple-choice", "--lr", "3e-3", "--epochs", 3, "--out", tmp_path / "run")
    metrics = done("train", tmp_path / "b", *training)
    assert metrics["accuracy"] > 0.9 and metrics["saved_bytes_batch"]["choices"] == 2
    evaluation = ("eval", "--model", tmp_path / "model", "--bundle", tmp_path / "b", "--adapter", tmp_path / "run")
    found = done(*evaluation, *data, "--epochs", 1)
    assert found["metric"] == "accuracy"
    assert found["scores"].keys() == {"zero-shot", "emulator", "plug-in", "full tuning"}
    done("plug", "--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "plugged")
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plugged")).__name__ == "GPT2LMHeadModel"
    choices = (*data, "--task", "multiple-choice", "--out", tmp_path / "other")
    refused("train", tmp_path / "b", *choices, "--method", "ladder", words=["a ladder does not choose"])
    refused("train", tmp_path / "b", *choices, "--block-size", 8, words=["--block-size: means nothing"])


def test_images(tmp_path):
    pytest.importorskip("PIL")
    save_vit(tmp_path / "model", blocks=4)
    write_colours(tmp_path / "train", 60, 1)
    write_colours(tmp_path / "test", 20, 2)
    distil = ("--distill", tmp_path / "train" / "red", "--steps", 2)
    done("make", "--model", tmp_path / "model", "--adapter", "1,1", "--out", tmp_path / "b", *distil)
    data = (
        "--train",
        tmp_path / "train",
        "--test",
        tmp_path / "test",
        "--task",
        "image-classification",
        "--lr",
        "3e-3",
    )
    metrics = done("train", tmp_path / "b", *data, "--out", tmp_path / "run", "--epochs", 3)
    assert metrics["accuracy"] > 0.8
    done("plug", "--model", tmp_path / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "plugged")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "plugged")
    assert loaded.config.id2label == {0: "blue", 1: "red"}


def test_refusals(world, tmp_path):
    folder, _ = world
    model, out = folder / "model", tmp_path / "out"
    make = ("make", "--model", model, "--out", out, "--adapter", "1,1")
    refused(*make, "--emulator", "keep:9", words=["keep: 9 of the 3 middle blocks"])
    refused(*make, "--emulator", "nf5", words=["emulator: 'nf5' is not available"])
    refused(*make, "--adapter", "two", words=["--adapter 'two'"])
    refused(*make, "--adapter", "3,2", words=["leaves no middle block of 5"])
    refused(*make, "--steps", 3, words=["--steps: means nothing without --distill"])
    refused(*make, "--distill", tmp_path / "no.txt", words=["no.txt"])
    refused(*make, "--secret", tmp_path / "no", words=["--secret", "cannot be read"])
    (tmp_path / "short").write_text("x")
    refused(*make, "--secret", tmp_path / "short", words=["at least 16"])
    text = ("--distill", folder / "train.tsv")
    refused(*make, "--emulator", "int8", *text, "--steps", 1, words=["int8 and nf4 weights cannot be trained"])
    refused(*make, *text, "--steps", 9, "--distill-lr", 1e30, words=["--distill-lr: the loss"])
    refused("make", "--model", model, "--out", folder / "bundle", words=["is there already"])
    data = ("--train", folder / "train.tsv", "--test", folder / "test.tsv", "--out", out)
    refused("train", tmp_path / "nothing", *data, words=["cannot be read"])
    refused("train", folder / "model", *data, words=["does not belong there"])
    refused("train", folder / "bundle", *data, "--task", "causal-lm", words=["has no language-model head"])
    refused("train", folder / "bundle", *data, "--task", "seq2seq-lm", words=["choose one of causal-lm"])
    refused("train", folder / "bundle", *data, "--method", "prefix", words=["method: 'prefix'"])
    refused("train", folder / "bundle", *data, "--text-column", "words", words=["words"])
    refused("train", folder / "bundle", *data[:-1], folder / "run", words=["already has a folder adapter"])
    refused("train", folder / "bundle", *data, "--method", "ladder", "--reduction", 3, words=["reduction: 3"])
    plug = ("plug", "--model", model, "--out", out)
    refused(*plug, "--adapter", folder / "bundle", words=["is refused"])
    refused(*plug, "--adapter", tmp_path, words=["does not belong there"])
    save_backbone(tmp_path / "other", seed=1, blocks=5)
    refused(
        "plug", "--model", tmp_path / "other", "--adapter", folder / "run", "--out", out, words=["not made of this"]
    )
    refused(*plug[:3], "--out", folder / "plugged", "--adapter", folder / "run", words=["is there already"])
    assert not out.exists()


@pytest.mark.parametrize("name", ["AutoModel", "AutoTokenizer", "AutoConfig", "GPT2Model"])
def test_an_adapter_does_not_choose_how_the_model_is_loaded(name, world, tmp_path, monkeypatch):
    folder, _ = world
    adapter = shutil.copytree(folder / "run" / "adapter", tmp_path / "adapter")
    of_bundle(lambda bundle: bundle["model"].update({"class": name}))(adapter)
    monkeypatch.setattr(offsite_model, "load_backbone", lambda *_: pytest.fail("it was loaded"))
    plug = ("plug", "--model", folder / "model", "--adapter", adapter, "--out", tmp_path / "out")
    refused(*plug, words=[f"model.class: '{name}' is refused"])


def test_alignment_on_texts_of_the_owners(world, tmp_path):
    folder, _ = world
    plug = ("plug", "--model", folder / "model", "--adapter", folder / "run", "--out", tmp_path / "p")
    texts = ("--align", folder / "train.tsv", "--align-steps", 3)
    refused(*plug, *texts, words=["--align: needs the emulator that was tuned; pass --bundle"])
    refused(*plug, "--align-lr", 1e-3, words=["--align-lr: means nothing without --align"])
    refused(*plug, *texts[:2], "--bundle", folder / "bundle", "--align-lr", -1, words=["learning_rate: -1.0"])
    refused(*plug, *texts, "--bundle", folder / "bundle", "--align-lr", 1e30, words=["--align-lr: the loss"])
    assert not (tmp_path / "p").exists()
    done(*plug, *texts, "--bundle", folder / "bundle")
    before, after = (
        transformers.AutoModelForSequenceClassification.from_pretrained(path).state_dict()
        for path in (folder / "plugged", tmp_path / "p")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".layer.4." in name for name in moved)
    evaluation = ("eval", "--model", folder / "model", "--bundle", folder / "bundle", "--adapter", folder / "run")
    found = [done(*evaluation, "--test", folder / "test.tsv", *more) for more in ((), texts)]
    assert found[0]["scores"]["emulator"] == found[1]["scores"]["emulator"]


def test_a_secret_must_come_again(world, tmp_path):
    folder, _ = world
    (tmp_path / "secret").write_bytes(os.urandom(32))
    make = ("make", "--model", folder / "model", "--adapter", "1,1", "--emulator", "keep:1", "--out", tmp_path / "b")
    done(*make, "--secret", tmp_path / "secret")
    data = ("--train", folder / "train.tsv", "--test", folder / "test.tsv", "--epochs", 1)
    done("train", tmp_path / "b", *data, "--out", tmp_path / "run")
    plug = ("plug", "--model", folder / "model", "--adapter", tmp_path / "run", "--out", tmp_path / "p")
    refused(*plug, words=["or with another secret"])
    refused(*plug, "--secret", tmp_path / "secret", "--bundle", folder / "bundle", words=["another bundle"])
    done(*plug, "--secret", tmp_path / "secret", "--bundle", tmp_path / "b")


def test_an_audit_says_what_leaves_the_house(world, tmp_path):
    folder, _ = world
    audit = ("audit", folder / "bundle", "--model", folder / "model")
    found = done(*audit, "--out", tmp_path / "audit", "--data", folder / "test.tsv")
    assert found["verbatim_matrices"] == pytest.approx(2 / 3) and 0 < found["untuned"]["hidden_cosine"] < 1
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == found
    assert (tmp_path / "audit" / "audit.png").read_bytes().startswith(b"\x89PNG")
    above = run(*audit, "--max-verbatim", "0.5")
    assert above.exit_code == 1 and "above --max-verbatim 0.5" in above.stderr
    assert run(*audit, "--max-verbatim", "0.7").exit_code == 0
    done("make", "--model", folder / "model", "--adapter", "1,1", "--emulator", "int8", "--out", tmp_path / "int8")
    said = run("audit", tmp_path / "int8", "--model", folder / "model", "--max-verbatim", "0.7")
    assert said.exit_code == 1 and "int8 hides nothing of them" in said.stdout
    done("make", "--model", folder / "model", "--adapter", "1,1", "--emulator", "svd:4", "--out", tmp_path / "svd")
    assert run("audit", tmp_path / "svd", "--model", folder / "model", "--max-verbatim", "0").exit_code == 0


def test_eval_compares_the_stages(world, tmp_path):
    folder, metrics = world
    arguments = ("--model", folder / "model", "--bundle", folder / "bundle", "--adapter", folder / "run")
    arguments += ("--test", folder / "test.tsv")
    found = done("eval", *arguments, "--train", folder / "train.tsv", "--epochs", 1, "--lr", "3e-3")
    assert list(found["scores"]) == ["zero-shot", "emulator", "plug-in", "full tuning"]
    assert found["scores"]["emulator"] == pytest.approx(metrics["test"]["accuracy"]) and found["n"] == 60
    assert set(found["promises"]) == {"zero-shot < plug-in", "emulator < plug-in", "plug-in ~ full tuning"}
    said = run("eval", *arguments).stdout
    assert "emulator < plug-in: " in said and "95 % intervals" in said
    done("make", "--model", folder / "model", "--adapter", "1,1", "--emulator", "keep:1", "--out", tmp_path / "other")
    refused("eval", *arguments[:3], tmp_path / "other", *arguments[4:], words=["was trained on another bundle"])
