"""tlfast bench: speed and memory against peers, as pytest-benchmark runs them, and the README's table of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import InputError
from .output import emit, note

PREFIX = "bench_"
_NOTHING_COLLECTED = 5  # pytest's status where a suite skips itself whole
_ROOT = Path(__file__).resolve().parents[2]  # of a source checkout; the suites are not part of a wheel
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Suites, benchmarks/bench_NAME.py; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .json file; what it has of other suites stays.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Run nothing; make the README's figures from benchmarks/results.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the benchmark suites, and rewrite the README's figures where --out is in benchmarks/results."""
    suites = _suites()
    _check_installed()
    if table:
        if names or out:
            raise InputError("--table runs nothing; leave names and --out out")
        _make_table()
        emit({"table": "README.md"}, ["README.md has the figures of benchmarks/results"], as_json)
        return
    if out is None:
        raise InputError("--out is missing; pass the .json file to write, such as benchmarks/results/NAME.json")
    chosen = _choose(names or sorted(suites), suites)
    results = _run(chosen, out)
    _write(results, out)
    if out.resolve().parent == _ROOT / "benchmarks" / "results":
        _make_table()
    emit(results, [f"{len(results['benchmarks'])} results in {out}"], as_json)


def _suites() -> dict[str, Path]:
    """Name -> file of every suite in the source checkout."""
    files = sorted((_ROOT / "benchmarks").glob(f"{PREFIX}*.py"))
    if not files:
        raise InputError(f"{_ROOT} is no source checkout, and the suites are only there; clone it, pip install -e .")
    return {path.stem.removeprefix(PREFIX): path for path in files}


def _check_installed() -> None:
    for package in ("pytest_benchmark", "peft", "transformers", "rich"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f'bench: the package {package} is not installed; run pip install -e ".[bench]"')


def _choose(names: list[str], suites: dict[str, Path]) -> list[Path]:
    unknown = [name for name in names if name not in suites]
    if unknown:
        raise InputError(f"suite {unknown[0]!r}: there is none of that name; choose from {', '.join(sorted(suites))}")
    return [suites[name] for name in names]


def _run(files: list[Path], out: Path) -> dict[str, Any]:
    """The suites' results together with those of other suites that are in `out` already."""
    from ..bench import measure, tables

    before = tables.read_results(out) if out.exists() else None
    here = measure.environment()
    if before is not None and before["environment"]["machine"] != here["machine"]:
        raise InputError(f"{out}: is from another machine; pass another --out, one file a machine")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--benchmark-json={raw}"]
        # 2: standard error, since standard output is for the result
        paths = [str(path.relative_to(_ROOT)) for path in files]
        status = subprocess.run([*command, *paths], cwd=_ROOT, stdout=2, check=False).returncode
        if status not in (0, _NOTHING_COLLECTED):
            note("a benchmark failed; nothing was written")
            raise typer.Exit(1)
        if not raw.is_file():  # pytest-benchmark writes none where no case ran
            note("every case was skipped, for the reasons above: nothing ran here, and nothing was written")
            raise typer.Exit(1)
        results = tables.read_results(raw)
    return _merge(before, results) | {"environment": here}


def _merge(before: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New results, without the single rounds, and the old ones of benchmarks that were not run again."""
    for entry in new["benchmarks"]:
        entry["stats"].pop("data", None)
    ran = {entry["fullname"] for entry in new["benchmarks"]}
    kept = [entry for entry in (before or {"benchmarks": []})["benchmarks"] if entry["fullname"] not in ran]
    merged = sorted([*kept, *new["benchmarks"]], key=lambda entry: entry["fullname"])
    return {"datetime": new["datetime"], "version": new["version"], "benchmarks": merged}


def _write(results: dict[str, Any], out: Path) -> None:
    from ..training import write_whole

    write_whole(out, json.dumps(results, indent=1, sort_keys=True) + "\n")


def _make_table() -> None:
    from ..bench import tables

    tables.regenerate(_ROOT / "README.md", _ROOT / "benchmarks" / "results")
