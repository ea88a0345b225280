"""The README's figures, made from benchmarks/results/*.json: one file a machine, as pytest-benchmark writes it.

A benchmark asks for a line of the table by extra_info["row"] = {"what", "ours", "peer", "how"}, all text, and shows the
demo's output by extra_info["demo"] = the demo's metrics.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import InputError
from . import tradeoffs
from .comparison import console_table, verdict

COLUMNS = {"what": "What", "ours": "tlfast", "peer": "Beside it", "how": "Command"}
PICTURE = "tradeoffs.svg"
STATIC = "static.json"  # written by tests/aot/test_static_report.py
_DEMO_WIDTH = 100


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every results file by its name without .json, in alphabetical order; not the static report, which no machine ran.

    Raises InputError for a file that is not what pytest-benchmark writes.
    """
    results = {}
    for path in sorted(set(folder.glob("*.json")) - {folder / STATIC}):
        results[path.stem] = read_results(path)
    return results


def read_results(path: Path) -> dict[str, Any]:
    """One results file; InputError where it is not what pytest-benchmark writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if all("extra_info" in entry and "fullname" in entry for entry in content["benchmarks"]):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: is not a file that pytest-benchmark wrote; run tlfast bench --out {path} anew")


def figures(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows of all machines as a Markdown table, with what each machine is below it."""
    lines = [_line([*COLUMNS.values(), "Machine"]), _line(["---"] * (len(COLUMNS) + 1))]
    for machine, content in results.items():
        for entry in content["benchmarks"]:
            if "row" in entry["extra_info"]:
                lines.append(_line([*_row(machine, entry), machine]))
    return "\n".join([*lines, "", *(f"- {name}: {_machine(content)}" for name, content in results.items())])


def demo_output(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the demo prints, from the first machine that ran it, as a Markdown code block.

    Raises InputError where no machine has.
    """
    for content in results.values():
        for entry in content["benchmarks"]:
            if "demo" in entry["extra_info"]:
                metrics = entry["extra_info"]["demo"]
                output = io.StringIO()
                console = Console(file=output, width=_DEMO_WIDTH, color_system=None)
                console.print(console_table(metrics["methods"], metrics["title"]))
                console.print(verdict(metrics["gain"]))
                lines = output.getvalue().splitlines()
                return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])
    raise InputError("no results file has the demo's figures; run tlfast bench demo --out benchmarks/results/NAME.json")


def regenerate(readme: Path, results: Path) -> None:
    """Rewrite what stands between the markers `<!-- figures -->` or `<!-- demo -->` and the following `<!-- end -->`.

    Beside the results, their picture is drawn (tradeoffs.py).

    Raises InputError where a marker is missing.
    """
    found = load_results(results)
    text = readme.read_text(encoding="utf-8")
    for name, block in (("figures", figures(found)), ("demo", demo_output(found))):
        text = _replace(text, name, block, readme)
    readme.write_text(text, encoding="utf-8")
    tradeoffs.draw(results / PICTURE, found)


def _replace(text: str, name: str, block: str, readme: Path) -> str:
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not start or not end:
        raise InputError(f"{readme}: the lines <!-- {name} --> and <!-- end --> are not there; put them back")
    return f"{before}{start}{block}\n{end}{after}"


def _row(machine: str, entry: Mapping[str, Any]) -> list[str]:
    row = entry["extra_info"]["row"]
    if set(row) != set(COLUMNS):
        raise InputError(f"{machine}.json, {entry['fullname']}: row has {sorted(row)}, not {sorted(COLUMNS)}")
    return [row["what"], row["ours"], row["peer"], f"`{row['how']}`"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _machine(content: Mapping[str, Any]) -> str:
    machine, versions = content["environment"]["machine"], content["environment"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if versions[name])
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores; {named}; {content['datetime'][:10]}"
