"""Runs of the command line on the data in $TLFAST_DATA/text, as a user makes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
REDUCTION = 4
SEEDS = (0, 1, 2)


def text_files(task: str) -> dict[str, Path | None]:
    """train, dev (None where there is none) and test of "sst2" or "trec"; skips where the data are missing."""
    folder = Path(os.environ.get("TLFAST_DATA", ROOT / "../shared/data")) / "text"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TLFAST_DATA to where text/ is")
    dev = folder / f"{task}_dev.tsv"
    return {
        "train": folder / f"{task}_train.tsv",
        "dev": dev if dev.is_file() else None,
        "test": folder / f"{task}_test.tsv",
    }


def train_ladder(
    files: dict[str, Path | None], seed: int, out: Path, *options: str, reduction: int = REDUCTION
) -> dict[str, Any]:
    """`tlfast ladder train` with MiniLM, its defaults but for the reduction; returns metrics.json."""
    command = [sys.executable, "-c", "from tlfast.cli import main; main()", "ladder", "train", "--backbone", "minilm"]
    command += [word for name, path in files.items() if path for word in (f"--{name}", str(path))]
    command += ["--reduction", str(reduction), "--seed", str(seed), "--json", *options]
    done = subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
