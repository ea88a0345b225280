"""Results of runs that take minutes, kept in .benchmarks/: a suite that was broken off goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.runs import ROOT
from tlfast.training import write_whole


def kept(suite: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run's figures: from .benchmarks/SUITE.json, or made now and put there. Remove that file to run anew."""
    file = ROOT / ".benchmarks" / f"{suite}.json"
    runs = _read(file)
    if name not in runs:
        made = make()
        runs = _read(file) | {name: made}  # another process may have put its own there in the meantime
        file.parent.mkdir(exist_ok=True)
        write_whole(file, json.dumps(runs, indent=1) + "\n")
    return runs[name]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
