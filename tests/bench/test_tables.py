"""The README's figures come out of results files and out of nothing else."""

import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from tlfast.bench import tables
from tlfast.data import InputError

METRICS = {
    "title": "The title",
    "methods": [
        {"name": "linear probe", "accuracy": 0.75, "seconds": 9.6, "saved_bytes": 1551, "trained_parameters": 1155},
        {"name": "ladder", "accuracy": 0.8, "seconds": 61.2, "saved_bytes": 384722, "trained_parameters": 968362},
    ],
    "gain": {"of": "ladder", "over": "linear probe", "accuracy": 0.05, "margin_95": 0.02, "examples": 2100},
}
ROW = {"what": "Bytes", "ours": "1 MiB", "peer": "a|b 2 MiB", "how": "pytest x"}


def machine(gpu=None):
    return {
        "machine": {"cpu": "A processor", "gpu": gpu, "cores": 2},
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": None},
    }


def write(folder, name, *extra_infos, gpu=None):
    benchmarks = [{"fullname": f"b{i}", "extra_info": extra, "stats": {}} for i, extra in enumerate(extra_infos)]
    content = {"datetime": "2026-01-02T03:04:05", "benchmarks": benchmarks, "environment": machine(gpu)}
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    write(folder, "cpu", {"row": ROW}, {"demo": METRICS}, {"other": 1})
    write(folder, "gpu", {"row": {**ROW, "what": "Time"}}, gpu="A card")
    return folder


def test_the_static_report_is_no_machines_results(results):
    (results / tables.STATIC).write_text("{}")
    assert set(tables.load_results(results)) == {"cpu", "gpu"}


def test_figures_have_one_line_a_row_and_name_the_machines(results):
    assert tables.figures(tables.load_results(results)).splitlines() == [
        "| What | tlfast | Beside it | Command | Machine |",
        "| --- | --- | --- | --- | --- |",
        "| Bytes | 1 MiB | a\\|b 2 MiB | `pytest x` | cpu |",
        "| Time | 1 MiB | a\\|b 2 MiB | `pytest x` | gpu |",
        "",
        "- cpu: A processor, 2 cores; python 3.11.7, torch 2.13.0; 2026-01-02",
        "- gpu: A card, 2 cores; python 3.11.7, torch 2.13.0; 2026-01-02",
    ]


def test_demo_output_is_the_demos_table(results):
    block = tables.demo_output(tables.load_results(results))
    assert block.startswith("```text\nThe title\n") and block.endswith("\n```")
    for figure in ("75.0 %", "10", "1.51 KiB", "1,155", "80.0 %", "61", "376 KiB", "968,362"):
        assert figure in block
    assert "ladder minus linear probe: +5.0 points, 95 % interval +3.0 to +7.0 (paired, 2,100 test texts)" in block


def test_regenerate_replaces_what_is_between_the_markers(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- demo -->\nold\n<!-- end -->\nb\n<!-- figures -->\n<!-- end -->\nc\n")
    tables.regenerate(readme, results)
    found = tables.load_results(results)
    expected = (
        f"a\n<!-- demo -->\n{tables.demo_output(found)}\n<!-- end -->\nb\n"
        f"<!-- figures -->\n{tables.figures(found)}\n<!-- end -->\nc\n"
    )
    assert readme.read_text() == expected
    tables.regenerate(readme, results)
    assert readme.read_text() == expected


@pytest.mark.parametrize("text", ["", "<!-- figures -->\n<!-- demo -->\n", "<!-- demo -->\n<!-- end -->\n"])
def test_a_missing_marker_is_named_and_nothing_written(results, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match=r"README.md: the lines <!-- figures --> and <!-- end --> are not there"):
        tables.regenerate(readme, results)
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"benchmarks": [{"fullname": "b"}]}', '{"benchmarks": 3}', "\x00"]
)
def test_a_file_of_another_kind_is_refused(results, content):
    (results / "other.json").write_text(content)
    with pytest.raises(InputError, match=r"other.json: is not a file that pytest-benchmark wrote"):
        tables.load_results(results)


def test_a_row_with_other_columns_is_refused(results):
    write(results, "bad", {"row": {"what": "x"}})
    with pytest.raises(InputError, match=r"bad.json, b0: row has \['what'\], not \['how', 'ours', 'peer', 'what'\]"):
        tables.figures(tables.load_results(results))


def test_results_without_the_demo_are_refused(tmp_path):
    write(tmp_path / "results", "cpu", {"row": ROW})
    with pytest.raises(InputError, match="no results file has the demo's figures; run tlfast bench demo"):
        tables.demo_output(tables.load_results(tmp_path / "results"))
