"""What a suite that was broken off keeps of its runs."""

import json

import pytest

from benchmarks import kept as module
from benchmarks.kept import kept


def test_runs_are_kept_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path / "new")
    (tmp_path / "new").mkdir()
    calls = []

    def run(name):
        def make():
            calls.append(name)
            if name == "second":
                raise KeyboardInterrupt
            return {"accuracy": 0.5}

        return kept("suite", name, make)

    assert run("first") == {"accuracy": 0.5}
    with pytest.raises(KeyboardInterrupt):
        run("second")
    assert json.loads((tmp_path / "new" / ".benchmarks" / "suite.json").read_text()) == {"first": {"accuracy": 0.5}}
    assert run("first") == {"accuracy": 0.5}
    assert calls == ["first", "second"]
