"""tlfast demo ktn on a few small sources: what it writes, and how it fails."""

import json
import os
import signal

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from tlfast.cli import app, demo, demo_ktn
from tlfast.data import python_code

pytestmark = pytest.mark.usefixtures("one_thread")
WRITTEN = {"graph", "class", "module", "report.md", "metrics.json"}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Two packages of sources whose functions say which one they are of."""
    words = {"a": "apple orchard fruit tree", "b": "metal furnace alloy forge"}
    for family, said in words.items():
        for i in range(8):
            path = tmp_path / "sources" / family / f"m{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            method = f"    def {said.split()[i % 4]}_{i}(self):\n        '''{said}'''\n        return {family}_call\n"
            path.write_text(f"class C{i}(Base{family}):\n{method}\ndef one(x):\n    '''{said}'''\n")
    folders = {family: tmp_path / "sources" / family for family in words}
    read = python_code.read_code
    monkeypatch.setattr(python_code, "read_code", lambda seed: read(seed=seed, folders=folders))
    monkeypatch.setattr(demo, "_check_installed", lambda: None)
    monkeypatch.setattr(demo_ktn, "BASELINES", ["none", "dan"])


def run(*arguments):
    return CliRunner().invoke(app, ["demo", "ktn", *map(str, arguments)], catch_exceptions=False)


def test_writes_graph_models_report_and_metrics(tmp_path):
    out = tmp_path / "new" / "demo"
    result = run("--out", out)
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in out.iterdir()} == WRITTEN
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["targets"]) == {"class", "module"}
    for target, found in metrics["targets"].items():
        assert set(found) == set(demo_ktn.WAYS)
        assert f"{100 * found['ktn']['accuracy']:.1f} %" in result.stdout
        assert {"schema.png", "curve.png", "metrics.json", "model.safetensors"} <= {
            p.name for p in (out / target).iterdir()
        }
        assert not (out / target / "checkpoints").exists()
    assert metrics["examples"]["class"] == 8 and metrics["examples"]["function"] == 16
    assert "KTN" in (out / "report.md").read_text()
    again = run("--out", out, "--json")
    assert json.loads(again.stdout)["targets"] == metrics["targets"], "an earlier demo is replaced, by the same figures"


def test_the_command_of_the_report_runs(tmp_path):
    out = tmp_path / "demo"
    assert run("--out", out).exit_code == 0
    line = next(line for line in (out / "report.md").read_text().splitlines() if line.startswith("Again: "))
    command = line.split("`")[1].split()[1:]
    command[command.index("--out") + 1] = str(tmp_path / "again")
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    metrics = (json.loads((folder / "metrics.json").read_text()) for folder in (out / "module", tmp_path / "again"))
    assert len({found["target"]["ktn"]["accuracy"] for found in metrics}) == 1


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    fit_into = demo_ktn.fit_into

    def interrupt(*arguments, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return fit_into(*arguments, **named)

    monkeypatch.setattr(demo_ktn, "fit_into", interrupt)
    result = run("--out", tmp_path / "demo")
    assert result.exit_code == 130 and "interrupted; nothing was kept" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_what_is_not_the_demos_is_not_replaced(tmp_path):
    (tmp_path / "out" / "graph").mkdir(parents=True)
    result = run("--out", tmp_path / "out")
    assert result.exit_code == 2 and "has a graph that is not the demo's" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["graph"]
