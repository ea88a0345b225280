"""tlfast demo on a tiny backbone and a small corpus: what it writes, and how it fails."""

import json
import os
import re
import signal

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from tlfast import training
from tlfast.bench.comparison import Method, cells, gain, in_bytes
from tlfast.cli import app, backbone, demo
from tlfast.data import docstrings

from .ladder_runs import run as run_ladder
from .ladder_runs import save_backbone

WRITTEN = {"report.md", "metrics.json", "comparison.png", "data", "ladder"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny backbone."""
    return save_backbone(tmp_path_factory.mktemp("backbone") / "bert")


@pytest.fixture(scope="module")
def corpus():
    return docstrings.load_corpus(train=30, dev=10, test=20)


@pytest.fixture(autouse=True)
def small(monkeypatch, tiny, corpus):
    """The demo on the tiny backbone, with few texts and one epoch."""
    load_backbone = backbone.load_backbone
    monkeypatch.setattr(demo, "load_backbone", lambda name: load_backbone(str(tiny)))
    monkeypatch.setattr(docstrings, "load_corpus", lambda seed: corpus)
    monkeypatch.setattr(demo, "MINILM", str(tiny))
    monkeypatch.setattr(demo, "MAX_TOKENS", 32)
    monkeypatch.setattr(demo, "REDUCTION", 2)
    monkeypatch.setattr(demo, "EPOCHS", 1)


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], catch_exceptions=False)


def test_writes_report_picture_metrics_data_and_ladder(tmp_path):
    out = tmp_path / "new" / "demo"
    result = run("--out", out)
    assert result.exit_code == 0
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text()
    metrics = json.loads((out / "metrics.json").read_text())
    for row in metrics["methods"]:
        assert f"| {' | '.join(cells(row))} |" in report
        assert all(cell in result.stdout for cell in cells(row))
    assert [row["name"] for row in metrics["methods"]] == ["linear probe", "ladder"]
    assert metrics["accuracy"] == metrics["methods"][1]["accuracy"]
    assert metrics["gain"]["accuracy"] == pytest.approx(metrics["accuracy"] - metrics["methods"][0]["accuracy"])
    assert metrics["examples"] == {"train": 90, "dev": 30, "test": 60}
    assert metrics["peak_memory_bytes"] > 0 and metrics["versions"]["torch"] == torch.__version__
    assert metrics["methods"][0]["trained_parameters"] == 3 * (32 + 1)


def test_json_prints_the_metrics_and_nothing_else(tmp_path):
    result = run("--out", tmp_path / "demo", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert result.stderr == ""


def test_the_ladder_it_leaves_scores_as_reported(tmp_path):
    run("ladder", "--out", tmp_path / "demo")
    scores = run_ladder(
        "eval", "--model", tmp_path / "demo/ladder", "--data", tmp_path / "demo/data/test.tsv", "--json"
    )
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert json.loads(scores.stdout)["accuracy"] == metrics["accuracy"]


def test_runs_again_over_its_own_results_and_leaves_other_files(tmp_path):
    assert run("--out", tmp_path).exit_code == 0
    (tmp_path / "mine.txt").write_text("mine")
    first = json.loads((tmp_path / "metrics.json").read_text())["methods"][1]["accuracy"]
    assert run("--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["methods"][1]["accuracy"] == first
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN | {"mine.txt"}


@pytest.mark.parametrize("theirs", ["data/precious.txt", "ladder/theirs.txt", "report.md", "metrics.json"])
def test_what_is_not_the_demos_is_never_replaced(tmp_path, theirs):
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("{}")
    fails(run("--out", tmp_path), "that is not the demo's; pass another --out")
    assert (tmp_path / theirs).read_text() == "{}"


def fails(result, message):
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and message in result.stderr


def test_an_unknown_demo_lists_those_that_exist(tmp_path):
    fails(run("lora", "--out", tmp_path / "demo"), "demo 'lora': there is no such demo; choose one of ladder, ktn")
    assert not (tmp_path / "demo").exists()


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_NEEDED", ("transformers", "gt_not_there"))
    fails(run("--out", tmp_path / "demo"), 'the package gt_not_there is not installed; run pip install -e ".[demo]"')
    assert not (tmp_path / "demo").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    fails(run("--out", tmp_path / "file"), "there is a file of that name")
    fails(run("--out", tmp_path / "file" / "demo"), "a part of the path is a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    fails(run("--out", tmp_path / "demo"), "not writable")


@pytest.mark.parametrize("moment", ["corpus", "training"])
@pytest.mark.parametrize("existed", [True, False])
def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch, moment, existed):
    out = tmp_path / "demo"
    if existed:
        out.mkdir()
        (out / "mine.txt").write_text("mine")

    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*_, **__)

    module, name = {"corpus": (docstrings, "load_corpus"), "training": (demo, "_fit_ladder")}[moment]
    original = getattr(module, name)
    monkeypatch.setattr(module, name, interrupt)
    result = run("--out", out)
    assert result.exit_code == 130
    assert "interrupted; nothing was kept" in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == (["demo", "mine.txt"] if existed else [])


def test_an_interrupted_fit_leaves_nothing(tmp_path, monkeypatch):
    """Training takes the first Ctrl-C itself, to save a checkpoint; the demo keeps none."""

    def fit(make_model, data, settings, checkpoints, *_):
        (checkpoints / "checkpoint-1").mkdir(parents=True)
        raise training.InterruptedTraining

    monkeypatch.setattr(training, "fit", fit)
    result = run("--out", tmp_path / "demo")
    assert result.exit_code == 130
    assert "interrupted; nothing was kept" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_gain_is_paired():
    right = torch.tensor([1, 1, 0, 1], dtype=torch.bool).numpy()
    worse = torch.tensor([1, 0, 0, 0], dtype=torch.bool).numpy()
    found = gain(Method({"name": "a"}, right), Method({"name": "b"}, worse))
    deviation = (4 * 0.25 / 3) ** 0.5  # of the differences 0, 1, 0, 1
    assert found["accuracy"] == 0.5
    assert found["margin_95"] == pytest.approx(1.96 * deviation / 2)


def test_bytes_have_three_figures():
    assert [in_bytes(n) for n in (0, 1023, 1024, 1551, 384722, 1023.9 * 2**10, 12.345 * 2**20, 3 * 2**30)] == [
        "0 B", "1023 B", "1.00 KiB", "1.51 KiB", "376 KiB", "1024 KiB", "12.3 MiB", "3.00 GiB",
    ]  # fmt: skip


def test_probe_of_two_classes_gives_scikit_learns_probabilities():
    from sklearn.linear_model import LogisticRegression

    from tlfast.bench.probe import _as_linear

    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64).numpy()
    regression = LogisticRegression().fit(x, (x[:, 0] > 0).astype(int))
    ours = _as_linear(regression)(torch.from_numpy(x).float()).softmax(1).detach().numpy()
    assert ours == pytest.approx(regression.predict_proba(x), abs=1e-6)


def test_corpus_files_have_the_columns_of_ladder_train(tmp_path):
    run("--out", tmp_path)
    header, *rows = (tmp_path / "data" / "train.tsv").read_text().splitlines()
    assert header.split("\t") == ["text", "label", "module"]
    assert all(re.fullmatch("python|numpy|torch", row.split("\t")[1]) for row in rows)
