"""tlfast bench runs suites, keeps what other suites gave, and rewrites the README's table."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("pytest_benchmark")
pytest.importorskip("peft")

from typer.testing import CliRunner

from tlfast.cli import app, bench

SUITE = """
def test_case(benchmark):
    benchmark.pedantic(int, rounds=1)
    benchmark.extra_info["row"] = {{"what": "{name}", "ours": "1", "peer": "2", "how": "x"}}
    benchmark.extra_info["demo"] = {demo}
"""
DEMO = {
    "title": "t",
    "methods": [{"name": "m", "accuracy": 1.0, "seconds": 1.0, "saved_bytes": 1, "trained_parameters": 1}],
    "gain": {"of": "a", "over": "b", "accuracy": 0.1, "margin_95": 0.1, "examples": 10},
}


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
    """A source checkout with three suites, one of which fails."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("one", "two"):
        (tmp_path / "benchmarks" / f"bench_{name}.py").write_text(SUITE.format(name=name, demo=DEMO))
    (tmp_path / "benchmarks" / "bench_red.py").write_text("def test_case(benchmark):\n    benchmark(1 / 0)\n")
    (tmp_path / "README.md").write_text("<!-- demo -->\n<!-- end -->\n<!-- figures -->\n<!-- end -->\n")
    monkeypatch.setattr(bench, "_ROOT", tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


def whats(path):
    return [entry["extra_info"]["row"]["what"] for entry in json.loads(path.read_text())["benchmarks"]]


def test_runs_the_named_suites_and_adds_to_the_file(checkout):
    out = checkout / "results.json"
    assert run("one", "--out", out).exit_code == 0
    assert whats(out) == ["one"]
    first = json.loads(out.read_text())["benchmarks"]
    result = run("two", "--out", out, "--json")
    assert json.loads(result.stdout) == json.loads(out.read_text())
    assert whats(out) == ["one", "two"]
    assert json.loads(out.read_text())["benchmarks"][0] == first[0]
    assert "data" not in first[0]["stats"] and first[0]["stats"]["rounds"] == 1
    assert (checkout / "README.md").read_text() == "<!-- demo -->\n<!-- end -->\n<!-- figures -->\n<!-- end -->\n"


def test_results_in_the_checkout_rewrite_the_readme(checkout):
    out = checkout / "benchmarks" / "results" / "here.json"
    assert run("one", "two", "--out", out).exit_code == 0
    readme = (checkout / "README.md").read_text()
    assert "| one | 1 | 2 | `x` | here |\n| two | 1 | 2 | `x` | here |" in readme
    out.write_text(out.read_text().replace('"what": "two"', '"what": "three"'))
    assert run("--table").exit_code == 0
    assert "| three | 1 | 2 | `x` | here |" in (checkout / "README.md").read_text()


def test_a_red_suite_writes_nothing(checkout):
    out = checkout / "results.json"
    result = run("--out", out)  # all of them
    assert result.exit_code == 1
    assert "a benchmark failed; nothing was written" in result.stderr
    assert not out.exists()


def test_suites_of_which_nothing_can_run_here_write_nothing(checkout):
    (checkout / "benchmarks" / "bench_gpu.py").write_text(
        "import pytest\npytest.skip('no GPU', allow_module_level=True)\n"
    )
    skipped = "import pytest\n@pytest.mark.skip(reason='no GPU')\ndef test_case(benchmark):\n    benchmark(int)\n"
    (checkout / "benchmarks" / "bench_cases.py").write_text(skipped)
    out = checkout / "results.json"
    for suites in (["cases"], ["gpu"], ["gpu", "cases"]):
        result = run(*suites, "--out", out)
        assert result.exit_code == 1 and not out.exists()
        assert result.stderr.splitlines()[-1].startswith("every case was skipped, for the reasons above: nothing ran")
    assert run("cases", "one", "--out", out).exit_code == 0
    assert whats(out) == ["one"]


def fails(message, *arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert message in result.stderr


def test_bad_input_is_one_line(checkout, tmp_path):
    fails("--out is missing; pass the .json file to write", "one")
    fails("suite 'nine': there is none of that name; choose from one, red, two", "nine", "--out", tmp_path / "x.json")
    fails("--table runs nothing; leave names and --out out", "one", "--table")
    (tmp_path / "other.json").write_text("{}")
    fails("other.json: is not a file that pytest-benchmark wrote", "one", "--out", tmp_path / "other.json")


def test_results_of_another_machine_are_not_mixed(checkout, tmp_path):
    content = {"benchmarks": [], "environment": {"machine": {"cpu": "another"}}}
    (tmp_path / "x.json").write_text(json.dumps(content))
    fails("x.json: is from another machine; pass another --out", "one", "--out", tmp_path / "x.json")


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_ROOT", tmp_path / "site-packages")
    fails("is no source checkout, and the suites are only there", "one", "--out", tmp_path / "x.json")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails('is not installed; run pip install -e ".[bench]"', "one", "--out", tmp_path / "x.json")
