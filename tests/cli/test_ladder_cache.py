"""tlfast ladder train --cache: the backbone runs once, and nothing else changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("typer")

from tlfast.backbone import FrozenBackbone, tap_cache
from tlfast.ladder import LadderModel

from .ladder_runs import BAD, GOOD, NEUTRAL, metrics, refused, save_backbone, train, write_sentences
from .task_runs import save_gpt2, save_t5, save_vit, write_colours, write_conll, write_counting, write_successors

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS, TAGS, IMAGES, CAUSAL, SEQ2SEQ = (
    "sequence-classification", "token-classification", "image-classification", "causal-lm", "seq2seq-lm",
)  # fmt: skip
OPTIONS = {
    TEXTS: ("--precision", "bf16"),
    CAUSAL: ("--block-size", 16),
    SEQ2SEQ: ("--decoder-layers", "0,1", "--layers", "1"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """task -> backbone, training and test data."""
    folder = tmp_path_factory.mktemp("data")
    bert = save_backbone(folder / "bert")
    save_backbone(folder / "other", seed=1)

    def both(write, name, count, *more):
        return write(folder / f"train-{name}", count, 0, *more), write(folder / f"test-{name}", 20, 1, *more)

    return {
        TEXTS: (bert, *both(write_sentences, "films.tsv", 100)),
        TAGS: (bert, *both(write_conll, "tags.conll", 60, GOOD, BAD, NEUTRAL)),
        IMAGES: (save_vit(folder / "vit"), *both(write_colours, "colours", 30)),
        CAUSAL: (save_gpt2(folder / "gpt2"), *both(write_counting, "counting.tsv", 60)),
        SEQ2SEQ: (save_t5(folder / "t5"), *both(write_successors, "successors.tsv", 60)),
        "other": folder / "other",
    }


def start(data, out, *options, task=TEXTS):
    return train(*data[task], out, "--task", task, "--epochs", 2, *OPTIONS.get(task, ()), *options)


def done(data, out, *options, task=TEXTS):
    result = start(data, out, *options, task=task)
    assert result.exit_code == 0, result.output
    return metrics(out)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run without a cache."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, done(data, out)


SCORES = (
    "train",
    "dev",
    "test",
    "best_epoch",
    "learning_rate",
    "trials",
    "saved_bytes_per_sample",
    "trained_parameters",
)


def assert_same_run(out, other, scores, others):
    for name in SCORES:
        assert scores[name] == others[name], name
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, other))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


def test_a_cached_run_equals_one_without_to_the_last_bit(data, plain, tmp_path):
    scores = done(data, tmp_path / "run", "--cache", tmp_path / "cache")
    assert_same_run(tmp_path / "run", plain[0], scores, plain[1])
    files = sorted(str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*.*"))
    assert files == [
        f"{part}/{name}" for part in ("dev", "train") for name in ("manifest.json", "taps-00000.safetensors")
    ]
    cache = scores["cache"]
    assert cache["storage"] == "exact" and cache["seconds"] > 0
    sizes = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors"))
    assert cache["bytes"] == cache["filled_bytes"] == sizes
    assert scores["settings"]["cache_storage"] == "exact"
    assert "cache" not in plain[1] and "cache_storage" not in plain[1]["settings"]


@pytest.mark.parametrize("task", [TEXTS, TAGS, IMAGES, CAUSAL, SEQ2SEQ])
def test_in_fp32_the_same_for_every_task_but_for_rounding(data, tmp_path, task):
    """Matrix products in float32 may round otherwise in another batch."""
    options = ("--precision", "fp32", "--epochs", 1)
    expected = done(data, tmp_path / "plain", *options, task=task)
    scores = done(data, tmp_path / "run", *options, "--cache", tmp_path / "cache", task=task)
    for part in ("train", "dev", "test"):
        assert scores[part] == pytest.approx(expected[part], rel=1e-4), part
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "plain"))
    for name, tensor in others.items():
        assert torch.allclose(weights[name].float(), tensor.float(), rtol=0, atol=1e-4), name


def test_several_rates_share_a_cache(data, tmp_path):
    options = ("--lr", "1e-2,1e-3", "--layers", "1", "--epochs", 1)
    expected = done(data, tmp_path / "plain", *options)
    scores = done(data, tmp_path / "run", *options, "--cache", tmp_path / "cache")
    assert_same_run(tmp_path / "run", tmp_path / "plain", scores, expected)
    manifest = json.loads((tmp_path / "cache" / "train" / "manifest.json").read_text())
    assert manifest["precision"] == "bf16" and manifest["taps"] == {"encoder": [1]}
    assert {part["dtype"] for part in manifest["parts"]} == {"BF16"}


def test_the_backbone_runs_once_for_an_example_whatever_the_epochs(data, tmp_path, monkeypatch):
    seen = []
    real = FrozenBackbone.forward

    def forward(self, **inputs):
        seen.append(len(inputs["input_ids"]))
        return real(self, **inputs)

    monkeypatch.setattr(FrozenBackbone, "forward", forward)
    counts = []
    for epochs in (1, 5):
        seen.clear()
        done(data, tmp_path / f"run{epochs}", "--epochs", epochs, "--cache", tmp_path / f"cache{epochs}")
        counts.append(sum(seen))
    assert counts[0] == counts[1]
    seen.clear()
    scores = done(data, tmp_path / "again", "--epochs", 5, "--reduction", 4, "--cache", tmp_path / "cache1")
    assert sum(seen) == counts[0] - 100  # train and dev are there
    assert scores["cache"]["filled_bytes"] == 0


def test_int8_takes_less_room_and_learns_alike(data, plain, cached, tmp_path):
    scores = done(data, tmp_path / "run", "--cache", tmp_path / "c", "--cache-storage", "int8")
    assert scores["cache"]["storage"] == "int8"
    assert scores["cache"]["bytes"] < 0.7 * sum(path.stat().st_size for path in cached.rglob("*.safetensors"))
    assert scores["dev"]["loss"] == pytest.approx(plain[1]["dev"]["loss"], rel=0.05)


def interrupt(monkeypatch, owner, name, call):
    """Ctrl-C at that call of a method."""
    real, calls = getattr(owner, name), []

    def method(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def test_ctrl_c_in_the_middle_of_training(data, plain, tmp_path, monkeypatch):
    options = (data, tmp_path / "run", "--cache", tmp_path / "cache")
    with monkeypatch.context() as patch:
        interrupt(patch, LadderModel, "_climbed", 15)
        result = start(*options)
    assert result.exit_code == 130 and "run the same command with --resume to go on" in result.stderr
    assert start(*options, "--resume").exit_code == 0
    assert_same_run(tmp_path / "run", plain[0], metrics(tmp_path / "run"), plain[1])


def test_ctrl_c_while_the_cache_is_filled(data, plain, tmp_path, monkeypatch):
    options = (data, tmp_path / "run", "--cache", tmp_path / "cache")
    monkeypatch.setattr(tap_cache, "_SHARD_SAMPLES", 40)
    with monkeypatch.context() as patch:
        interrupt(patch, LadderModel, "look", 4)
        result = start(*options)
    assert result.exit_code == 130
    assert f"the same command goes on with what is in {tmp_path / 'cache'}" in result.stderr
    assert not (tmp_path / "run").exists()
    assert sorted(path.name for path in (tmp_path / "cache" / "train").iterdir()) == [
        "manifest.json", "taps-00000.safetensors",
    ]  # fmt: skip
    assert start(*options).exit_code == 0
    assert_same_run(tmp_path / "run", plain[0], metrics(tmp_path / "run"), plain[1])


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from tlfast.backbone import tap_cache, tap_shards
from tlfast.ladder import LadderModel
from tlfast.training import trainer
tap_cache._SHARD_SAMPLES = 40
owner = {{"LadderModel": LadderModel, "ShardWriter": tap_shards.ShardWriter, "os": os}}["{owner}"]
real, calls = owner.{name}, []
def method(*args, **kwargs):
    calls.append(None)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
owner.{name} = method
from tlfast.cli import main
main()
"""


@pytest.mark.parametrize(
    ("owner", "name", "call"), [("ShardWriter", "put", 70), ("os", "replace", 5), ("LadderModel", "_climbed", 21)]
)
def test_kill_9_and_on(data, plain, tmp_path, monkeypatch, owner, name, call):
    bert, train_file, test_file = map(str, data[TEXTS])
    out, cache = tmp_path / "run", tmp_path / "cache"
    command = [sys.executable, "-c", KILLED.format(owner=owner, name=name, call=call), "ladder", "train"]
    command += [
        "--backbone",
        bert,
        "--train",
        train_file,
        "--test",
        test_file,
        "--out",
        str(out),
        "--cache",
        str(cache),
    ]
    command += ["--reduction", "2", "--epochs", "2", "--batch-size", "8", "--lr", "1e-2", "--precision", "bf16"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(tap_cache, "_SHARD_SAMPLES", 40)
    assert_same_run(out, plain[0], done(data, out, "--cache", cache, "--resume"), plain[1])
    assert not [name for name in os.listdir(tmp_path / "cache" / "train") if name.startswith(".taps")]


@pytest.fixture(scope="module")
def cached(data, tmp_path_factory):
    """The cache of a finished run."""
    folder = tmp_path_factory.mktemp("cached")
    done(data, folder / "run", "--cache", folder / "cache")
    return folder / "cache"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8"), "differs in the backbone's precision (bf16 there, int8 here)"),
        (("--layers", "0"), 'differs in the tapped blocks ({"encoder": [0, 1]} there, {"encoder": [0]} here)'),
        (("--seed", 3), "differs in the data"),  # it splits off another tenth for dev
        (("--cache-storage", "int8"), "differs in the storage (exact there, int8 here)"),
    ],
)
def test_a_cache_of_other_settings_is_refused(data, cached, tmp_path, options, message):
    refused(start(data, tmp_path / "run", "--cache", cached, *options), message, "pass another folder")
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_model_or_other_data_is_refused(data, cached, tmp_path):
    bert, train_file, test_file = data[TEXTS]
    other = {TEXTS: (data["other"], train_file, test_file)}
    refused(start(other, tmp_path / "run", "--cache", cached), "differs in the backbone (")
    longer = shutil.copy(train_file, tmp_path / "train.tsv")
    with longer.open("a") as file:
        file.write("a good film\t1\n")
    other = {TEXTS: (bert, longer, test_file)}
    refused(start(other, tmp_path / "run", "--cache", cached), "differs in the data")
    assert not (tmp_path / "run").exists()


def test_options_that_mean_nothing(data, tmp_path):
    refused(start(data, tmp_path / "run", "--cache-storage", "int8"), "--cache-storage: means nothing without")
    options = ("--cache", tmp_path / "c", "--cache-storage", "int4")
    refused(start(data, tmp_path / "run", *options), "--cache-storage 'int4'", "exact, int8")
    assert not (tmp_path / "c").exists()


def test_folders_that_cannot_be_a_cache(data, tmp_path):
    (tmp_path / "file").write_text("text")
    refused(start(data, tmp_path / "run", "--cache", tmp_path / "file"), "a part of the path is a file")
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "notes.txt").write_text("text")
    refused(start(data, tmp_path / "run", "--cache", tmp_path / "mine"), "so it is no cache of taps")


def test_a_disk_that_is_too_small(data, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tap_cache.shutil, "disk_usage", lambda _: usage._replace(free=2**10))
    result = start(data, tmp_path / "run", "--cache", tmp_path / "cache")
    refused(result, f"{tmp_path / 'cache'}: the taps need 0.", "MiB are free there; free some")


def test_a_disk_that_fills_up(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlfast.backbone.tap_shards._allocate", full)
    result = start(data, tmp_path / "run", "--cache", tmp_path / "cache")
    refused(result, f"{tmp_path / 'cache'}: no space left on the device; free some")
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "cache" / "train").iterdir()] == ["manifest.json"]


def test_a_damaged_shard_ends_the_run_with_one_line_and_is_mended_by_the_next(data, plain, tmp_path):
    done(data, tmp_path / "first", "--cache", tmp_path / "cache")
    shard = tmp_path / "cache" / "train" / "taps-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    options = (data, tmp_path / "run", "--cache", tmp_path / "cache")
    refused(start(*options, "--json"), f"{shard}: is damaged; remove it")
    shard.unlink()
    assert start(*options).exit_code == 0
    assert_same_run(tmp_path / "run", plain[0], metrics(tmp_path / "run"), plain[1])
