"""tlfast ktn: fit and predict on a small graph, and what they refuse in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from tests.ktn.test_training import two_worlds
from tlfast.cli import app
from tlfast.graph import Adjacency, save

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ktn")
    graph = two_worlds()
    graph.class_names = ["red", "green", "blue"]
    save(graph, folder / "graph")
    np.save(folder / "more.npy", np.where(np.arange(60) < 12, graph.y["user"].numpy(), -1))
    result = fit(folder / "graph", folder / "run", "--more-labels", folder / "more.npy")
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


def run(*arguments):
    return CliRunner().invoke(app, ["ktn", *map(str, arguments)], catch_exceptions=False)


def fit(graph, out, *more, source="item", target="user"):
    small = ("--hidden", 16, "--lr", 1e-2, "--json")
    return run("fit", "--graph", graph, "--source", source, "--target", target, "--out", out, *small, *more)


def refused(result, *words):
    assert result.exit_code == 2
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_metrics(folder):
    path, metrics = folder
    assert json.loads((path / "run" / "metrics.json").read_text()) == metrics
    kinds = {"accuracy", "micro_f1", "macro_f1", "ndcg", "ndcg_paper", "mrr"}
    assert set(metrics["source"]) == kinds
    for part in ("target", "more_labels"):
        assert set(metrics[part]) == {"raw", "ktn", "vote", "label_propagation"}
        assert all(set(found) == kinds for found in metrics[part].values())
    assert metrics["target"]["ktn"]["accuracy"] > 0.9
    assert metrics["metapaths"] == ["item <-buys- user"]
    assert metrics["settings"]["hidden"] == 16 and metrics["machine"] and metrics["versions"]
    for name in ("seconds_per_epoch", "saved_bytes_per_sample", "peak_memory_bytes"):
        assert metrics[name] > 0
    for picture in ("curve.png", "schema.png"):
        assert (path / "run" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_predictions_are_those_that_were_scored(folder, suffix, tmp_path):
    path, metrics = folder
    out = tmp_path / f"users{suffix}"
    result = run("predict", "--model", path / "run", "--graph", path / "graph", "--out", out, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["predictions"] == 60
    lines = out.read_text().splitlines()
    if suffix == ".jsonl":
        labels = [json.loads(line)["label"] for line in lines]
    else:
        assert lines[0] == "node\tlabel\tprobability"
        labels = [line.split("\t")[1] for line in lines[1:]]
    right = sum(label == ["red", "green", "blue"][i % 3] for i, label in enumerate(labels)) / 60
    assert right == pytest.approx(metrics["target"]["ktn"]["accuracy"])


def test_refusals_of_fit(folder, tmp_path):
    path, _ = folder
    refused(fit(path / "graph", path / "run"), "already holds a run")
    refused(fit(tmp_path, tmp_path / "run"), "no graph.json")
    refused(fit(path / "graph", tmp_path / "run", target="book"), "target 'book'", "'item', 'user'")
    refused(fit(path / "graph", tmp_path / "run", "--hops", 0), "hops must be at least 1")
    np.save(tmp_path / "short.npy", np.zeros(3, dtype=np.int64))
    refused(fit(path / "graph", tmp_path / "run", "--more-labels", tmp_path / "short.npy"), "short.npy", "(60,)")
    (tmp_path / "damaged.npy").write_bytes(b"PK\x03\x04 no archive")
    refused(fit(path / "graph", tmp_path / "run", "--more-labels", tmp_path / "damaged.npy"), "damaged.npy", "no .npy")
    assert not (tmp_path / "run").exists()


def test_refusals_of_predict(folder, tmp_path):
    path, _ = folder
    graph, out = path / "graph", tmp_path / "x.tsv"
    refused(run("predict", "--model", tmp_path, "--graph", graph, "--out", out), "no folder that tlfast ktn fit wrote")
    refused(run("predict", "--model", path / "run", "--graph", graph, "--out", tmp_path / "x.txt"), "'.txt'")
    other = two_worlds()
    other.x["item"] = other.x["item"][:, :5]
    save(other, tmp_path / "other")
    result = run("predict", "--model", path / "run", "--graph", tmp_path / "other", "--out", out)
    refused(result, "was trained on the types", "'item': 6", "'item': 5")


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": None},
        {"class_names": None},
        {"num_classes": "three"},
        {"class_names": ["red"]},
        {"class_names": 3},
    ],
)
def test_a_damaged_config_is_refused(change, folder, tmp_path):
    path, _ = folder
    shutil.copytree(path / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    for name, value in change.items():
        config.pop(name)
        config |= {} if value is None else {name: value}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    result = run("predict", "--model", tmp_path / "run", "--graph", path / "graph", "--out", tmp_path / "x.tsv")
    refused(result, "is no folder that tlfast ktn fit wrote, or is damaged", next(iter(change)))


INTERRUPTED = """
import signal, sys
import torch
from tlfast.cli import app
from tlfast.ktn.hmpnn import HMPNN
torch.set_num_threads(1)
calls, forward = [], HMPNN.forward
def counted(self, *arguments):
    calls.append(1)
    if len(calls) == int(sys.argv[1]): signal.raise_signal(signal.SIGINT)
    return forward(self, *arguments)
HMPNN.forward = counted
app(sys.argv[2:])
"""


def interrupted(at, *arguments):
    """The command, which sends itself Ctrl-C in its `at`-th forward."""
    command = [sys.executable, "-c", INTERRUPTED, str(at), "ktn", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_interrupted_fit_goes_on(folder, tmp_path):
    path, whole = folder
    out = tmp_path / "run"
    more = ("--hidden", 16, "--lr", 1e-2, "--json", "--more-labels", path / "more.npy")
    arguments = ("fit", "--graph", path / "graph", "--source", "item", "--target", "user", "--out", out, *more)
    cut = interrupted(1, *arguments)
    assert (cut.returncode, cut.stdout) == (130, "")
    assert "interrupted; there is nothing to resume" in cut.stderr and not out.exists()
    cut = interrupted(20, *arguments)
    assert (cut.returncode, cut.stdout) == (130, "")
    assert cut.stderr.splitlines()[-1] == "interrupted; run the same command with --resume to go on"
    assert [entry.name for entry in (out / "checkpoints").iterdir()] == ["checkpoint-18"]
    refused(run(*arguments, "--resume", "--seed", 3), "started with seed=0, not 3")
    other = two_worlds(seed=5)
    save(other, tmp_path / "other")
    refused(run(*arguments, "--resume", "--graph", tmp_path / "other"), "started with graph_sha256=")
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    resumed = json.loads(result.stdout)
    for name in ("source", "target", "more_labels", "best_epoch", "epochs", "metapaths", "settings"):
        assert resumed[name] == whole[name]
    assert (out / "model.safetensors").read_bytes() == (path / "run" / "model.safetensors").read_bytes()
    assert not (out / "checkpoints").exists()
    assert json.loads(run(*arguments, "--resume").stdout) == resumed


def test_a_damaged_state_is_refused(folder, tmp_path):
    path, _ = folder
    arguments = ("fit", "--graph", path / "graph", "--source", "item", "--target", "user", "--out", tmp_path / "run")
    assert interrupted(9, *arguments).returncode == 130
    (state,) = (tmp_path / "run" / "checkpoints").glob("*/state.pt")
    state.write_bytes(state.read_bytes()[:100])
    refused(run(*arguments, "--resume"), "is damaged", "start again")
    assert state.exists()


def test_baselines_that_train(folder, tmp_path):
    path, _ = folder
    result = fit(
        path / "graph", tmp_path / "run", "--epochs", 3, "--baselines", "none, cdan", "--more-labels", path / "more.npy"
    )
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)
    for part in ("target", "more_labels"):
        assert set(metrics[part]) == {"raw", "ktn", "vote", "label_propagation", "no_transfer", "cdan"}
    refused(
        fit(path / "graph", tmp_path / "other", "--baselines", "jan"), "'jan'", "none, dan, coral, dann, cdan, or all"
    )


def test_imported_graphs_can_be_fitted(tmp_path):
    from tests.graph.test_importers import write_dblp, write_oag, write_ogb

    for layout, write, more in (
        ("oag", write_oag, ["--labels", "L2"]),
        ("ogb", write_ogb, []),
        ("dblp", write_dblp, []),
    ):
        arguments = ("import", "--format", layout, "--from", write(tmp_path / layout), *more)
        result = run(*arguments, "--out", tmp_path / "graphs" / layout, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["nodes"]["paper"] in (3, 4)
        assert [path.name for path in (tmp_path / "graphs").iterdir() if path.name.startswith(".")] == []
    again = run(*arguments, "--out", tmp_path / "graphs" / "dblp")
    refused(again, "is there already")
    result = fit(tmp_path / "graphs" / "oag", tmp_path / "run", "--epochs", 2, source="paper", target="author")
    assert result.exit_code == 0, result.stderr


def test_refusals_of_import(tmp_path):
    arguments = ("import", "--from", tmp_path, "--out", tmp_path / "out")
    refused(run(*arguments, "--format", "dgl"), "'dgl'", "oag, ogb, dblp")
    refused(run(*arguments, "--format", "ogb", "--labels", "L2"), "--labels is for --format oag")
    refused(run(*arguments, "--format", "oag"), "has no nodes-<type>.npy")
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_an_import_says_what_it_cannot_read(tmp_path):
    (tmp_path / "oag" / "nodes-paper.npy").mkdir(parents=True)
    result = run("import", "--from", tmp_path / "oag", "--out", tmp_path / "out", "--format", "oag")
    refused(result, f"{tmp_path / 'oag'}: cannot be read", "nodes-paper.npy")
    assert str(tmp_path / "out") not in result.stderr and not (tmp_path / "out").exists()


def test_a_fit_on_batches_never_differentiates_the_whole_graph(folder, tmp_path, monkeypatch):
    from tlfast.ktn.hmpnn import HMPNN

    path, _ = folder
    whole, forward = [], HMPNN.forward

    def watched(self, x, structure):
        if isinstance(structure, Adjacency):
            whole.append(torch.is_grad_enabled())
        return forward(self, x, structure)

    monkeypatch.setattr(HMPNN, "forward", watched)
    more = ("--more-labels", path / "more.npy", "--epochs", 2)
    sampled = fit(path / "graph", tmp_path / "run", *more, "--batch-size", 4, "--neighbours", 1)
    assert sampled.exit_code == 0, sampled.stderr
    assert whole == [False], "one forward of the whole graph, which predicts"
    assert json.loads(sampled.stdout)["saved_bytes_per_sample"] > 0
    assert fit(path / "graph", tmp_path / "whole", *more).exit_code == 0
    assert whole[1:].count(False) == 1 and whole.count(True) == 4, "three of the training, one that is measured"


def test_batches(folder, tmp_path):
    path, _ = folder
    sampled = ("--batch-size", 16, "--neighbours", 3, "--epochs", 40)
    result = fit(path / "graph", tmp_path / "run", *sampled)
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert metrics["target"]["ktn"]["accuracy"] > 0.9 and metrics["settings"]["batch_size"] == 16
    again = fit(path / "graph", tmp_path / "again", *sampled)
    assert json.loads(again.stdout)["target"] == metrics["target"]
    refused(fit(path / "graph", tmp_path / "a", "--batch-size", -1), "batch_size", "-1", "0 for the whole graph")
    refused(fit(path / "graph", tmp_path / "b", *sampled[:2], "--neighbours", 0), "neighbours", "0")
    refused(fit(path / "graph", tmp_path / "c", *sampled, "--baselines", "none"), "--baselines", "--batch-size")
    assert not (tmp_path / "c").exists()
