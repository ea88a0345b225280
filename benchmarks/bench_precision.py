"""What the precision of the frozen weights costs a ladder: SST-2 and TREC, MiniLM, five seeds, paired by seed.

`tlfast ladder train` with its defaults. A run takes minutes, so each result is kept in .benchmarks/precision.json, and
a suite that was broken off goes on from there; remove that file to train anew.
"""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frozen import freeze_or_reason, minilm
from benchmarks.kept import kept
from benchmarks.runs import text_files, train_ladder
from tlfast import LadderConfig

PRECISIONS = ("fp32", "bf16", "int8")
SEEDS = (0, 1, 2, 3, 4)
_T_95 = 2.776  # Student's t with 4 degrees of freedom


@pytest.mark.parametrize("task", ["sst2", "trec"])
def test_accuracy(benchmark: Any, tmp_path: Path, task: str) -> None:
    refused = {p: reason for p in PRECISIONS if isinstance(reason := freeze_or_reason(minilm(), p), str)}
    precisions = [precision for precision in PRECISIONS if precision not in refused]
    if len(precisions) < 2:
        pytest.skip(f"there is nothing to compare: freeze refuses {'; '.join(map(': '.join, refused.items()))}")
    runs: dict[str, list[dict[str, Any]]] = {precision: [] for precision in precisions}

    def all_seeds() -> None:
        for seed in SEEDS:
            for precision in precisions:
                run = functools.partial(_trained, task, precision, seed, tmp_path)
                runs[precision].append(kept("precision", f"{task} {precision} {seed}", run))

    benchmark.pedantic(all_seeds, rounds=1)
    accuracy = {precision: [run["accuracy"] for run in found] for precision, found in runs.items()}
    against = {p: paired(values, accuracy["fp32"]) for p, values in accuracy.items() if p != "fp32"}
    benchmark.extra_info["runs"] = runs
    benchmark.extra_info["refused"] = refused
    benchmark.extra_info["minus_fp32"] = against
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy by the precision of the frozen weights, {task.upper()}, MiniLM-L6, "
        f"mean of {len(SEEDS)} seeds",
        "ours": ", ".join(
            f"{p} {100 * statistics.mean(accuracy[p]):.1f} % ({100 * mean:+.2f} ± {100 * margin:.2f} points, paired)"
            for p, (mean, margin) in against.items()
        ),
        "peer": f"fp32 {100 * statistics.mean(accuracy['fp32']):.1f} %",
        "how": "tlfast ladder train --backbone minilm --precision int8",
    }


def paired(values: list[float], baseline: list[float]) -> tuple[float, float]:
    """The mean of what the seeds differ by, and the half-width of its 95 % interval."""
    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    return statistics.mean(differences), _T_95 * statistics.stdev(differences) / len(differences) ** 0.5


def _trained(task: str, precision: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run's figures."""
    options = ("--reduction", str(LadderConfig().reduction), "--precision", precision)
    metrics = train_ladder(text_files(task), seed, folder / f"{task}-{precision}-{seed}", *options)
    seconds = sum(metrics["epoch_seconds"])
    return {"accuracy": metrics["accuracy"], "dev": metrics["dev"]["accuracy"], "seconds": seconds}
