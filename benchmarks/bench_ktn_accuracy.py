"""Zero-shot accuracy on DBLP four-area: `tlfast ktn fit` as a user runs it, its baselines, and the neighbours' vote.

Defaults of the command but for the hops to conferences. Five seeds, ten where the 20 conferences are the target;
one seed for the baselines that train. Papers are scored by their venue's area and, beside that, by hand labels.
The data are in $TLFAST_DATA/dblp.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs import ROOT

TASKS = {
    ("author", "paper"): (1, 5),
    ("paper", "author"): (1, 5),
    ("author", "conf"): (2, 10),
    ("conf", "author"): (2, 5),
}
SHOWN = {"raw": "untransferred", "vote": "vote", "label_propagation": "label propagation"}
each_task = pytest.mark.parametrize("source, target", TASKS, ids=["_to_".join(task) for task in TASKS])
TRAINED = {
    "no_transfer": "no transfer",
    "dan": "DAN",
    "coral": "CORAL",
    "dann": "DANN",
    "cdan": "CDAN",
}


def _folder() -> Path:
    folder = Path(os.environ.get("TLFAST_DATA", ROOT / "../shared/data")) / "dblp"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set TLFAST_DATA to where dblp/ is")
    return folder


def _fit(graph: Path, source: str, target: str, hops: int, seed: int, out: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-c", "from tlfast.cli import main; main()", "ktn", "fit", "--graph", str(graph)]
    command += ["--source", source, "--target", target, "--hops", str(hops), "--seed", str(seed), "--json"]
    if target == "paper":
        command += ["--more-labels", str(graph / "paper.y_human.npy")]
    done = subprocess.run([*command, "--out", str(out), *more], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _accuracies(runs: list[dict[str, Any]], part: str, name: str) -> list[float]:
    return [run[part][name]["accuracy"] for run in runs if name in run.get(part, {})]


def _how(source: str, target: str, hops: int) -> str:
    return f"tlfast ktn fit --source {source} --target {target}" + (f" --hops {hops}" if hops > 1 else "")


@each_task
def test_ktn_accuracy(benchmark, tmp_path, source, target):
    graph, (hops, seeds) = _folder(), TASKS[source, target]
    runs: list[dict[str, Any]] = []

    def all_seeds() -> None:
        for seed in range(seeds):
            runs.append(_fit(graph, source, target, hops, seed, tmp_path / str(seed)))

    benchmark.pedantic(all_seeds, rounds=1)
    benchmark.extra_info["runs"] = [
        {
            part: {name: found["accuracy"] for name, found in run[part].items()}
            for part in ("target", "more_labels")
            if part in run
        }
        for run in runs
    ]
    ktn = _accuracies(runs, "target", "ktn")
    ours = f"{100 * statistics.mean(ktn):.1f} % ({100 * min(ktn):.1f} to {100 * max(ktn):.1f})"
    by_hand = _accuracies(runs, "more_labels", "ktn")
    if by_hand:
        vote = _accuracies(runs, "more_labels", "vote")
        ours += (
            f"; by 100 hand labels {100 * statistics.mean(by_hand):.1f} % (vote {100 * statistics.mean(vote):.1f} %)"
        )
    peers = {shown: _accuracies(runs, "target", name) for name, shown in SHOWN.items()}
    benchmark.extra_info["row"] = {
        "what": f"Zero-shot accuracy on DBLP, {source} to {target}, mean of {seeds} seeds (range)",
        "ours": ours,
        "peer": ", ".join(f"{shown} {100 * statistics.mean(found):.1f} %" for shown, found in peers.items()),
        "how": _how(source, target, hops),
    }


@each_task
def test_ktn_baselines(benchmark, tmp_path, source, target):
    graph, (hops, _) = _folder(), TASKS[source, target]
    more = ("--baselines", "all")
    run = benchmark.pedantic(_fit, (graph, source, target, hops, 0, tmp_path / "run", *more), rounds=1)
    found = {name: scores["accuracy"] for name, scores in run["target"].items()}
    benchmark.extra_info["target"] = found
    benchmark.extra_info["row"] = {
        "what": f"Zero-shot accuracy on DBLP, {source} to {target}, seed 0, beside baselines that train",
        "ours": f"{100 * found['ktn']:.1f} %",
        "peer": ", ".join(f"{shown} {100 * found[name]:.1f} %" for name, shown in TRAINED.items()),
        "how": f"{_how(source, target, hops)} --baselines all",
    }
