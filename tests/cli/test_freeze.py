"""tlfast freeze, and the commands that take what it writes as --backbone."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from tests.cli.ladder_runs import metrics, refused, save_backbone, train, write_sentences
from tests.cli.ladder_runs import run as run_ladder
from tests.cli.task_runs import save_gpt2, save_t5, save_vit, write_colours, write_counting
from tlfast.backbone import FrozenBackbone
from tlfast.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def freeze(backbone, out, *more):
    result = run("freeze", "--backbone", backbone, "--out", out, "--json", *more)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def embed(backbone, data, out, *more):
    result = run("embed", "--backbone", backbone, "--data", data, "--out", out, *more)
    assert result.exit_code == 0, result.stderr
    return np.load(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A backbone, its int8 twin, data files, and a ladder trained on the twin."""
    folder = tmp_path_factory.mktemp("freeze")
    save_backbone(folder / "bert")
    freeze(folder / "bert", folder / "int8", "--precision", "int8")
    write_sentences(folder / "train.tsv", 60, seed=0)
    write_sentences(folder / "test.tsv", 20, seed=2)
    result = train(folder / "int8", folder / "train.tsv", folder / "test.tsv", folder / "run")
    assert result.exit_code == 0, result.stderr
    return folder


def test_it_says_what_it_wrote(data, tmp_path):
    found = freeze(data / "bert", tmp_path / "nf4", "--precision", "nf4")
    backbone = FrozenBackbone.from_pretrained(tmp_path / "nf4")
    assert found["fingerprint"] == backbone.fingerprint()
    assert found["weight_bytes"] == backbone.weight_bytes() < found["model_bytes"]
    assert (found["precision"], found["blocks"], found["packed_blocks"], found["why_not_packed"]) == ("nf4", 2, 2, [])
    assert found["worst_weight_error"] == max(row["weight_error"] for row in backbone.describe()) > 0
    lines = run("freeze", "--backbone", data / "bert", "--out", tmp_path / "fp32", "--precision", "fp32").stdout
    assert f"fp32 backbone in {tmp_path / 'fp32'}: " in lines
    assert "0 of 2 blocks run over packed tokens (narrower than" in lines


def test_embed_gives_what_the_precision_gives(data, tmp_path):
    prepared = embed(data / "int8", data / "test.tsv", tmp_path / "a.npy")
    at_once = embed(data / "bert", data / "test.tsv", tmp_path / "b.npy", "--precision", "int8")
    np.testing.assert_array_equal(prepared, at_once)
    named = embed(data / "int8", data / "test.tsv", tmp_path / "c.npy", "--precision", "int8")
    np.testing.assert_array_equal(named, prepared)


def test_a_ladder_records_what_it_was_trained_on(data):
    settings = metrics(data / "run")["settings"]
    backbone = FrozenBackbone.from_pretrained(data / "int8")
    assert (settings["precision"], settings["fingerprint"]) == ("int8", backbone.fingerprint())
    assert settings["backbone"] == str((data / "int8").resolve())
    saved = json.loads((data / "run" / "config.json").read_text())["backbone"]
    assert (saved["precision"], saved["fingerprint"]) == ("int8", backbone.fingerprint())


def test_a_ladder_is_scored_on_it_and_on_the_model_it_came_from(data, tmp_path):
    test = metrics(data / "run")["test"]
    for backbone in ((), ("--backbone", data / "bert")):
        result = run_ladder("eval", "--model", data / "run", "--data", data / "test.tsv", "--json", *backbone)
        assert json.loads(result.stdout)["accuracy"] == test["accuracy"]
    result = run_ladder(
        "predict", "--model", data / "run", "--data", data / "test.tsv", "--out", tmp_path / "p.tsv", "--json"
    )
    assert json.loads(result.stdout)["predictions"] == 20


def test_a_ladder_on_another_backbone_is_refused(data, tmp_path):
    arguments = ("eval", "--model", data / "run", "--data", data / "test.tsv", "--backbone")
    freeze(data / "bert", tmp_path / "bf16", "--precision", "bf16")
    result = run_ladder(*arguments, tmp_path / "bf16")
    refused(
        result, "its precision is bf16, and the ladder in", "was trained on int8; pass freeze(model, precision='int8')"
    )
    save_backbone(tmp_path / "other", seed=1)
    freeze(tmp_path / "other", tmp_path / "int8", "--precision", "int8")
    refused(run_ladder(*arguments, tmp_path / "int8"), "are not those the ladder in")


def test_calibration_reads_the_first_texts(data, tmp_path):
    freeze(data / "bert", tmp_path / "given", "--precision", "int8", "--calibration", data / "train.tsv")
    query = (
        FrozenBackbone.from_pretrained(f).blocks[0].attention.self.query for f in (tmp_path / "given", data / "int8")
    )
    given, made_up = (layer.smooth for layer in query)
    assert (given != made_up).any()


def test_language_models_keep_their_head(tmp_path):
    for save, task in ((save_gpt2, "causal-lm"), (save_t5, "seq2seq-lm")):
        model = save(tmp_path / task)
        write_counting(tmp_path / "digits.tsv", 20, seed=0)
        calibration = ("--calibration", tmp_path / "digits.tsv")
        freeze(model, tmp_path / f"{task}-int8", "--precision", "int8", "--task", task, *calibration)
        assert FrozenBackbone.from_pretrained(tmp_path / f"{task}-int8").lm_head is not None
        freeze(model, tmp_path / f"{task}-bf16", "--precision", "bf16")
        assert FrozenBackbone.from_pretrained(tmp_path / f"{task}-bf16").lm_head is None


def test_a_ladder_that_writes_needs_the_head(data, tmp_path):
    freeze(save_gpt2(tmp_path / "gpt2"), tmp_path / "int8", "--precision", "int8")
    write_counting(tmp_path / "digits.tsv", 20, seed=0)
    files = (tmp_path / "digits.tsv", tmp_path / "digits.tsv", tmp_path / "run")
    refused(
        train(tmp_path / "int8", *files, "--task", "causal-lm", "--dev", files[0]),
        "it has no language-model head; load it with AutoModelForCausalLM",
    )
    assert not (tmp_path / "run").exists()


def test_models_of_images(tmp_path):
    folder, images = save_vit(tmp_path / "vit"), write_colours(tmp_path / "colours", 10, seed=0) / "red"
    freeze(folder, tmp_path / "int8", "--precision", "int8", "--calibration", images)
    vectors = embed(tmp_path / "int8", images, tmp_path / "a.npy")
    exact = embed(folder, images, tmp_path / "b.npy")
    assert np.linalg.norm(vectors - exact) < 0.05 * np.linalg.norm(exact)
    texts = write_sentences(tmp_path / "texts.tsv", 4, seed=0)
    result = run("freeze", "--backbone", folder, "--precision", "int8", "--out", tmp_path / "c", "--calibration", texts)
    refused(result, "the model reads images; pass a folder of them")


# what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--precision": "int4"}, "precision: 'int4' is not available"),
        ({"--backbone": "int8"}, "is prepared already; pass the model it came from"),
        ({"--backbone": "./nowhere"}, "there is no such folder"),
        ({"--task": "karaoke"}, "--task 'karaoke': is not available"),
        ({"--calibration": "none.tsv"}, "none.tsv: there is no such file"),
        ({"--calibration": "run"}, "is a folder, and the model reads texts"),
        ({"--precision": "nf4", "--calibration": "train.tsv"}, "calibration: only int8 is calibrated"),
        ({"--out": "run"}, "holds something else than a prepared backbone; pass another --out"),
        ({"--out": "train.tsv"}, "holds something else than a prepared backbone; pass another --out"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(data)
    options = {"--backbone": "bert", "--precision": "int8", "--out": tmp_path / "new"} | changes
    before = sorted(data.iterdir())
    refused(run("freeze", *(part for option in options.items() for part in option)), message)
    assert sorted(data.iterdir()) == before and not (tmp_path / "new").exists()


def test_a_full_disk(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tlfast.backbone.tensor_file._bytes", full)
    out = tmp_path / "new"
    result = run("freeze", "--backbone", data / "bert", "--precision", "int8", "--out", out)
    refused(result, f"{out}: no space left on the device; free some")
    assert not out.exists()


def test_a_prepared_folder_that_does_not_fit(data, tmp_path):
    folder = shutil.copytree(data / "int8", tmp_path / "int8")
    arguments = ("embed", "--backbone", folder, "--data", data / "test.tsv", "--out", tmp_path / "a.npy")
    message = "is prepared in int8; leave --precision out, or pass the model it came from"
    refused(run(*arguments, "--precision", "bf16"), "--precision bf16:", message)
    (folder / "frozen.safetensors").unlink()
    refused(run(*arguments), "frozen.safetensors: the file is missing")
    shutil.copy(data / "int8" / "frozen.safetensors", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    refused(run(*arguments), "its tokenizer has no vocabulary; add tokenizer.json or vocab.txt")
