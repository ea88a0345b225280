"""tlfast demo klite on a tiny backbone and few texts: what it writes, that its figures hold, and how it fails."""

import json
import os
import signal

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from tlfast import knowledge
from tlfast.cli import app, backbone, demo_klite
from tlfast.cli.text_encoder import text_encoder
from tlfast.data import packages, read_examples

from .ladder_runs import save_backbone

WRITTEN = {"report.md", "metrics.json", "blend.png", "glossary.tsv", "data"}
MOST = 3  # packages

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny backbone."""
    return save_backbone(tmp_path_factory.mktemp("backbone") / "bert")


@pytest.fixture(autouse=True)
def small(monkeypatch, tiny):
    """The demo on the tiny backbone, with few texts of few packages."""
    families = packages.installed_families()[:MOST]
    monkeypatch.setattr(packages, "installed_families", lambda: families)
    load_backbone = backbone.load_backbone
    monkeypatch.setattr(demo_klite, "load_backbone", lambda name: load_backbone(str(tiny)))
    for name, value in (("DEV", 6), ("TEST", 12), ("FILES", 40)):
        monkeypatch.setattr(demo_klite, name, value)


def run(*arguments):
    return CliRunner().invoke(app, ["demo", "klite", *map(str, arguments)], catch_exceptions=False)


def test_writes_report_picture_metrics_data_and_glossary(tmp_path):
    out = tmp_path / "new" / "demo"
    result = run("--out", out)
    assert result.exit_code == 0
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert (out / "blend.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((out / "metrics.json").read_text())
    report = (out / "report.md").read_text()
    for row in metrics["methods"]:
        cells = demo_klite._cells(row)
        assert f"| {' | '.join(cells)} |" in report and all(cell in result.stdout for cell in cells)
    for line in demo_klite._lines(metrics):
        assert f"- {line}" in report
    assert metrics["coverage"] == {"classes": 3, "covered": 2, "missing": [packages.STANDARD_LIBRARY]}
    assert metrics["examples"] == {"dev": 6 * MOST, "test": 12 * MOST}
    assert "2 of 3 packages have a summary" in result.stdout


def test_its_figures_are_those_of_its_files(tmp_path, tiny):
    metrics = json.loads(run("--out", tmp_path / "demo", "--json").stdout)
    glossary = knowledge.Glossary(tmp_path / "demo" / "glossary.tsv")
    test, dev = (
        read_examples(tmp_path / "demo" / "data" / f"{name}.tsv", "text", "label", False) for name in ("test", "dev")
    )
    names = [family.name for family in packages.installed_families()]
    loaded = backbone.load_backbone(str(tiny))
    encode = text_encoder(loaded)
    budget = knowledge.TokenBudget.of_tokenizer(loaded.tokenizer, loaded.max_length)
    senses = [next(iter(glossary.lookup(name)), None) for name in names]
    prompts = knowledge.make_prompts(names, senses, budget, demo_klite.TEMPLATES)
    classes = knowledge.embed_classes(prompts, encode)

    def accuracy(examples, weight):
        labels = torch.tensor([names.index(label) for label in examples.labels])
        return classes.accuracy(encode(examples.texts), labels, weight)

    for row in metrics["methods"]:
        assert accuracy(test, row["weight"]) == pytest.approx(row["accuracy"], abs=1e-9)
    best = max(metrics["dev_accuracies"].values())
    assert accuracy(dev, metrics["methods"][2]["weight"]) == pytest.approx(best, abs=1e-9)
    first, second, third = metrics["methods"]
    assert (first["weight"], second["weight"]) == (0.0, 1.0)
    gains = [gain["accuracy"] for gain in metrics["gains"]]
    assert gains == pytest.approx([row["accuracy"] - first["accuracy"] for row in (second, third)])


def test_json_prints_the_metrics_and_nothing_else(tmp_path):
    result = run("--out", tmp_path / "demo", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert result.stderr == ""


def test_runs_again_over_its_own_results_but_not_over_the_ladders(tmp_path):
    out = tmp_path / "demo"
    assert run("--out", out).exit_code == 0
    assert run("--out", out).exit_code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics | {"title": "another demo's"}))
    result = run("--out", out)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "that is not the demo's; pass another --out" in result.stderr


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(knowledge, "cover", interrupt)
    result = run("--out", tmp_path / "demo")
    assert result.exit_code == 130 and "interrupted; nothing was kept" in result.stderr
    assert list(tmp_path.iterdir()) == []
