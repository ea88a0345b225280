"""The picture of what accuracy costs: panels from results, the same bytes each time."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tlfast.bench import tables, tradeoffs
from tlfast.data import InputError


def results(machine="here", **tradeoff):
    asked = {"what": "SST-2", "cost": "seconds", "points": {"ladder": [10, 0.861], "LoRA": [100, 0.869]}} | tradeoff
    entries = [
        {"fullname": "a", "extra_info": {"tradeoff": asked}},
        {"fullname": "b", "extra_info": {}},
    ]
    return {machine: {"benchmarks": entries}}


def test_a_panel_has_every_method(tmp_path):
    path = tmp_path / "picture.svg"
    assert tradeoffs.draw(path, results())
    text = path.read_text(encoding="utf-8")
    for words in ("SST-2 (here)", "seconds", "ladder 86.1 %", "LoRA 86.9 %"):
        assert words in text
    tradeoffs.draw(tmp_path / "again.svg", results())
    assert (tmp_path / "again.svg").read_bytes() == path.read_bytes()


def test_the_same_panel_of_two_machines_is_drawn_once():
    found = tradeoffs.panels(results("a") | results("b") | results("c", cost="MiB"))
    assert [(panel["cost"], panel["machine"]) for panel in found] == [("MiB", "c"), ("seconds", "b")]


def test_without_panels_nothing_is_written(tmp_path):
    assert not tradeoffs.draw(tmp_path / "picture.svg", {"here": {"benchmarks": [{"extra_info": {}}]}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"points": {}}, {"colour": "red"}])
def test_an_entry_of_another_form_is_refused(wrong):
    with pytest.raises(InputError, match=r"here\.json, a: tradeoff"):
        tradeoffs.panels(results(**wrong))


def test_regenerating_the_readme_draws_it(tmp_path):
    for file in (ROOT / "benchmarks" / "results").glob("xeon*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures -->\n<!-- end -->\n<!-- demo -->\n<!-- end -->\n", encoding="utf-8")
    tables.regenerate(readme, tmp_path)
    assert "SST2, MiniLM-L6 (xeon" in (tmp_path / tables.PICTURE).read_text(encoding="utf-8")
