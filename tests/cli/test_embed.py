"""tlfast embed: vectors in the file's order, interrupted and resumed, and what it refuses."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from typer.testing import CliRunner

from tests.cli.ladder_runs import refused, save_backbone, write_pairs, write_sentences
from tests.cli.task_runs import save_gpt2, save_t5, save_vit, write_colours, write_counting
from tlfast.cli import app
from tlfast.data import read_images
from tlfast.data.images import open_image

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    save_backbone(folder / "bert")
    save_backbone(folder / "other", seed=1)
    write_sentences(folder / "texts.tsv", 40, seed=0)
    write_pairs(folder / "pairs.csv", 20, seed=0)
    write_counting(folder / "digits.tsv", 20, seed=0)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["embed", *map(str, arguments)], catch_exceptions=False)


def embed(backbone, data, out, *more):
    """The object and the array."""
    result = run("--backbone", backbone, "--data", data, "--out", out, "--json", *more)
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)] == [out.name]
    return json.loads(result.stdout), np.load(out)


def columns(path, separator="\t"):
    return [line.split(separator) for line in path.read_text().splitlines()[1:]]


def last_hidden_states(folder, texts, pairs=None, encoder=False):
    """transformers on each text alone, in float32 and float64: lists of (S, D)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
        model = model.get_encoder() if encoder else model
        with torch.no_grad():
            found.append(
                [
                    model(**tokenizer(text, pair, return_tensors="pt", truncation=True)).last_hidden_state[0]
                    for text, pair in zip(texts, pairs or [None] * len(texts), strict=True)
                ]
            )
    return found


def check(vectors, hidden, reduce):
    """Within what float32 errs from float64, each row against its own text."""
    plain, exact = (torch.stack([reduce(states) for states in rows]).double().numpy() for rows in hidden)
    assert vectors.dtype == np.float32 and vectors.shape == exact.shape
    error, allowed = np.abs(vectors - exact).max(), 1.5 * np.abs(plain - exact).max() + np.finfo(np.float32).eps
    assert error <= allowed
    assert np.abs(exact - np.roll(exact, 1, axis=0)).max(axis=1).min() > 100 * allowed, "rows differ, so order shows"


def mean(states):
    return states.mean(dim=0)


def test_means_in_the_files_order(data, tmp_path):
    result, vectors = embed(data / "bert", data / "texts.tsv", tmp_path / "f.npy")
    assert (result["rows"], result["width"], result["pooling"], result["layer"]) == (40, 32, "mean", None)
    assert (result["truncated"], result["resumed_at"], result["precision"]) == (0, 0, "fp32")
    assert result["rows_per_second"] > 0
    texts = [row[0] for row in columns(data / "texts.tsv")]
    check(vectors, last_hidden_states(data / "bert", texts), mean)


def test_small_batches_give_the_same(data, tmp_path):
    _, many = embed(data / "bert", data / "texts.tsv", tmp_path / "f.npy")
    _, few = embed(data / "bert", data / "texts.tsv", tmp_path / "g.npy", "--batch-tokens", 20)
    np.testing.assert_allclose(few, many, rtol=0, atol=1e-5 * np.abs(many).max())


def test_pairs_are_read_together_or_left_out(data, tmp_path):
    rows = columns(data / "pairs.csv", ",")
    first, second = ([row[i] for row in rows] for i in (0, 1))
    _, together = embed(data / "bert", data / "pairs.csv", tmp_path / "f.npy")
    check(together, last_hidden_states(data / "bert", first, second), mean)
    _, alone = embed(data / "bert", data / "pairs.csv", tmp_path / "f.npy", "--no-pairs")
    check(alone, last_hidden_states(data / "bert", first), mean)
    _, other = embed(data / "bert", data / "pairs.csv", tmp_path / "f.npy", "--text-column", "text_pair")
    check(other, last_hidden_states(data / "bert", second), mean)


def test_a_decoder_gives_its_last_token(data, tmp_path):
    folder = save_gpt2(tmp_path / "gpt2")
    result, vectors = embed(folder, data / "digits.tsv", tmp_path / "f.npy")
    assert result["pooling"] == "last"
    texts = [row[0] for row in columns(data / "digits.tsv")]
    check(vectors, last_hidden_states(folder, texts), lambda states: states[-1])


def test_an_encoder_decoder_gives_its_encoder(data, tmp_path):
    folder = save_t5(tmp_path / "t5")
    result, vectors = embed(folder, data / "digits.tsv", tmp_path / "f.npy")
    assert result["pooling"] == "mean"
    texts = [row[0] for row in columns(data / "digits.tsv")]
    check(vectors, last_hidden_states(folder, texts, encoder=True), mean)


def test_a_folder_of_images(tmp_path):
    folder = save_vit(tmp_path / "vit")
    images = write_colours(tmp_path / "colours", 10, seed=0) / "red"
    result, vectors = embed(folder, images, tmp_path / "f.npy")
    assert (result["rows"], result["pooling"]) == (5, "cls")
    processor, hidden = AutoImageProcessor.from_pretrained(folder), []
    pixels = processor([open_image(file) for file in read_images(images).files], return_tensors="pt")["pixel_values"]
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            hidden.append(AutoModel.from_pretrained(folder, dtype=dtype).eval()(pixels.to(dtype)).last_hidden_state)
    check(vectors, hidden, lambda states: states[0])


def test_settings_reach_the_vectors(data, tmp_path):
    _, plain = embed(data / "bert", data / "texts.tsv", tmp_path / "f.npy", "--pooling", "cls")
    result, unit = embed(data / "bert", data / "texts.tsv", tmp_path / "f.npy", "--pooling", "cls", "--normalize")
    assert result["normalized"]
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5, atol=1e-7)
    result, last = embed(data / "bert", data / "texts.tsv", tmp_path / "f.npy", "--pooling", "cls", "--layer", -1)
    assert result["layer"] == 1
    np.testing.assert_array_equal(last, plain)  # BERT has no norm behind its last block
    _, first = embed(data / "bert", data / "texts.tsv", tmp_path / "f.npy", "--pooling", "cls", "--layer", 0)
    assert np.abs(first - plain).max() > 0.01


def test_texts_that_are_too_long_are_cut_and_said(data, tmp_path):
    path = tmp_path / "long.tsv"
    path.write_text("text\n" + "good film\n" + "bad " * 40 + "\n")
    result = run("--backbone", data / "bert", "--data", path, "--out", tmp_path / "f.npy")
    assert result.exit_code == 0
    assert f"{path}: 1 texts are longer than the model takes and were cut" in result.stderr
    assert "2 x 32 in" in result.stdout and "mean of the last hidden state" in result.stdout
    assert np.load(tmp_path / "f.npy").shape == (2, 32)


# interrupted and resumed

INTERRUPTED = """
import sys, signal
from tlfast.cli import main
from tlfast.features import array
written, write = [], array.FeatureFile.write
def stop(*arguments):
    write(*arguments)
    written.append(None)
    if len(written) == 3: signal.raise_signal(signal.{signal})
array.FeatureFile.write = stop
array._SAVE_SECONDS = -1.0
main()
"""


def broken_off(name, *arguments):
    """`tlfast embed` in a process that sends itself a signal after three batches."""
    command = [sys.executable, "-c", INTERRUPTED.format(signal=name), "embed", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)])
def test_a_run_that_was_broken_off_goes_on(data, tmp_path, name, status):
    _, whole = embed(data / "bert", data / "texts.tsv", tmp_path / "whole.npy", "--batch-tokens", 30)
    again = ("--backbone", data / "bert", "--data", data / "texts.tsv", "--out", tmp_path / "f.npy")
    again += ("--batch-tokens", 30)
    done = broken_off(name, *again)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert not (tmp_path / "f.npy").exists()
    if name == "SIGINT":
        assert done.stderr.splitlines()[-1] == "interrupted; run the same command with --resume to go on"

    refused(run(*again), "f.npy.part: holds an unfinished run; add --resume to go on with it")
    for change, message in (
        (("--pooling", "cls"), "pooling='mean', not 'cls'"),
        (("--layer", 0), "layer=None, not 0"),
        (("--normalize",), "normalize=False, not True"),
        (("--batch-tokens", 31), "batch_tokens=30, not 31"),
        (("--backbone", data / "other"), "backbone="),
    ):
        refused(run(*again, "--resume", *change), message, "resume it with the same")
    other = write_sentences(tmp_path / "other.tsv", 40, seed=1)
    refused(run(*again, "--resume", "--data", other), "data_sha256=")

    result, resumed = embed(*again[1:6:2], "--batch-tokens", 30, "--resume")
    assert 0 < result["resumed_at"] < 40
    np.testing.assert_array_equal(resumed, whole)


def test_weights_that_changed_in_their_folder(data, tmp_path):
    folder = shutil.copytree(data / "bert", tmp_path / "bert")
    again = ("--backbone", folder, "--data", data / "texts.tsv", "--out", tmp_path / "f.npy", "--batch-tokens", 30)
    assert broken_off("SIGINT", *again).returncode == 130
    shutil.copy(data / "other" / "model.safetensors", folder)
    refused(run(*again, "--resume"), "fingerprint=", "resume it with the same")


def test_interrupted_before_anything_was_written(data, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tlfast.features.extract.Extractor.__call__", interrupt)
    result = run("--backbone", data / "bert", "--data", data / "texts.tsv", "--out", tmp_path / "f.npy")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted; there is nothing to resume" in result.stderr
    assert list(tmp_path.iterdir()) == []


# what is refused


def refuses(data, tmp_path, *more, messages):
    files = sorted(tmp_path.iterdir())
    arguments = ("--backbone", data / "bert", "--data", data / "texts.tsv", "--out", tmp_path / "f.npy", *more)
    refused(run(*arguments), *messages)
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--data", "none.tsv", "none.tsv: there is no such file"),
        ("--data", "none.txt", "the extension '.txt' is not known"),
        ("--out", "f.txt", "the features are an .npy file; name one, such as f.npy"),
        ("--out", "/nowhere/f.npy", "its folder does not exist"),
        ("--backbone", "./nowhere", "there is no such folder"),
        ("--text-column", "sentence", "there is no column 'sentence'; it has 'text', 'label'"),
        ("--pair-column", "second", "there is no column 'second'"),
        ("--pair-column", "text", "--pair-column 'text': is the column of the first texts too"),
        ("--pooling", "max", "pooling: 'max' is not available; allowed: 'mean', 'cls', 'last'"),
        ("--layer", "2", "layer: 2 is not a block; the model has blocks 0 to 1"),
        ("--precision", "fp3", "precision: 'fp3' is not available"),
    ],
)
def test_one_wrong_option(data, tmp_path, option, value, message):
    refuses(data, tmp_path, option, value, messages=[message])


def test_other_things_that_are_wrong(data, tmp_path, monkeypatch):
    empty = tmp_path / "empty.tsv"
    empty.write_text("")
    refuses(data, tmp_path, "--data", empty, messages=["empty.tsv: the file is empty"])
    refuses(data, tmp_path, "--resume", messages=["there is no unfinished run to resume"])
    pairs = ("--data", data / "pairs.csv", "--pair-column", "text_pair", "--no-pairs")
    refuses(data, tmp_path, *pairs, messages=["--no-pairs: leaves out what --pair-column names"])
    images = write_colours(tmp_path / "colours", 4, seed=0) / "red"
    refuses(
        data, tmp_path, "--data", images, "--text-column", "a", messages=["--text-column: means nothing for images"]
    )
    refuses(data, tmp_path, "--data", images, messages=["cannot be loaded"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1024))
    refuses(data, tmp_path, messages=["f.npy: needs 0.0 MiB, and 0.0 MiB are free there; free some"])


def test_a_broken_image_keeps_what_was_done(tmp_path):
    folder = save_vit(tmp_path / "vit")
    images = write_colours(tmp_path / "colours", 80, seed=0) / "red"
    last = sorted(images.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-200])
    result = run("--backbone", folder, "--data", images, "--out", tmp_path / "f.npy")
    refused(result, f"{last}: the image is broken", "replace or remove it")
    assert not (tmp_path / "f.npy").exists()
    assert json.loads((tmp_path / "f.npy.part.json").read_text())["done"] == 32  # five batches of eight, but the last
