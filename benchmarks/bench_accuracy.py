"""Test accuracy in the time LoRA takes: `tlfast ladder train`, LoRA and a linear probe on SST-2 and TREC, MiniLM.

Five seeds each. The ladder is the command with its defaults but for reduction 4, on a bf16 backbone with a cache of
taps, which every run fills anew. LoRA: r=8 on query and value, lr 1e-3, batch 32, 2 epochs on SST-2 and 3 on TREC, in
float32 or in bf16 autocast, whichever the first seed finds faster. Dev selects the epoch of both, and the test file is
read once. A run takes minutes, so each result is kept in .benchmarks/accuracy.json, and a suite that was broken off
goes on from there; remove that file to train anew. The data are in $TLFAST_DATA/text.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tlfast
from benchmarks import lora
from benchmarks.runs import REDUCTION, ROOT, text_files, train_ladder
from tlfast import training
from tlfast.bench.comparison import difference
from tlfast.bench.probe import fit_probe
from tlfast.cli.backbone import load_backbone

SEEDS = (0, 1, 2, 3, 4)
KEPT = ROOT / ".benchmarks" / "accuracy.json"
LADDER = ("--precision", "bf16")

Run = dict[str, Any]


def _kept(name: str, make: Callable[[], Run]) -> Run:
    """A run's figures: from the file of those that were made before, or made now."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    if name not in kept:
        kept[name] = make()
        KEPT.parent.mkdir(exist_ok=True)
        training.write_whole(KEPT, json.dumps(kept, indent=1) + "\n")
    return kept[name]


def ladder_run(task: str, seed: int, folder: Path) -> Run:
    """The command: seconds from its start to its end, with imports, filling the cache, dev and test."""
    files, out = text_files(task), folder / f"{task}-{seed}"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    metrics = train_ladder(files, seed, out, *LADDER, "--cache", str(folder / f"{task}-{seed}-taps"))
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    correct = _correct(out, files["test"])
    assert sum(correct) / len(correct) == metrics["accuracy"]
    return {
        "accuracy": metrics["accuracy"],
        "dev": metrics["dev"]["accuracy"],
        "best_epoch": metrics["best_epoch"],
        "seconds": seconds,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "cache_seconds": metrics["cache"]["seconds"],
        "epoch_seconds": metrics["epoch_seconds"],
        "correct": correct,
    }


def _correct(folder: Path, test_file: Path) -> list[bool]:
    """Which test examples the ladder in a run's folder classifies correctly."""
    task, loaded = training.load_task(folder), load_backbone("minilm")
    test = task.dataset(task.read(test_file, labelled=True), loaded.tokenizer)
    model = tlfast.LadderModel.from_pretrained(folder, backbone=loaded.model)
    predicted = training.predict_logits(model, test, task.collate(loaded.tokenizer)).argmax(axis=1)
    return [bool(p == label) for p, label in zip(predicted, test.labels, strict=True)]


def probe_run(task: str, seed: int) -> Run:
    """The linear probe."""
    loaded, files = load_backbone("minilm"), text_files(task)
    kind, data = training.load_data(
        training.TextTask(loaded.max_length, "minilm"), files["train"], files["dev"], loaded.tokenizer, seed
    )
    start = time.perf_counter()
    probe = fit_probe(tlfast.freeze(loaded.model), data)
    seconds = time.perf_counter() - start
    test = kind.dataset(kind.read(files["test"], labelled=True), loaded.tokenizer)
    return {"accuracy": training.evaluate(probe, test, data.collate, data.scoring)["accuracy"], "seconds": seconds}


def lora_run(task: str, precision: str, seed: int, folder: Path) -> Run:
    """LoRA: seconds of training and dev alone."""
    out = folder / f"{task}-{precision}-{seed}"
    return lora.train_lora(text_files(task), lora.EPOCHS[task], seed, out, precision)


def _all_runs(task: str, folder: Path) -> dict[str, list[Run]]:
    def run_lora(precision: str, seed: int) -> Run:
        return _kept(f"{task} LoRA {precision} {seed}", lambda: lora_run(task, precision, seed, folder))

    faster = min(lora.PRECISIONS, key=lambda precision: run_lora(precision, SEEDS[0])["cpu_seconds"])
    return {
        "ladder": [_kept(f"{task} ladder {seed}", lambda seed=seed: ladder_run(task, seed, folder)) for seed in SEEDS],
        f"LoRA in {faster}": [run_lora(faster, seed) for seed in SEEDS],
        "linear probe": [_kept(f"{task} probe {seed}", lambda seed=seed: probe_run(task, seed)) for seed in SEEDS],
    }


@pytest.mark.parametrize("task", ["sst2", "trec"])
def test_accuracy(benchmark: Any, tmp_path: Path, task: str) -> None:
    text_files(task)  # skips where there are none
    runs: dict[str, list[Run]] = {}
    benchmark.pedantic(lambda: runs.update(_all_runs(task, tmp_path)), rounds=1)
    ladder, peer, probe = runs
    gap = difference(*(np.array([run["correct"] for run in runs[name]]) for name in (ladder, peer)))
    mean = {
        name: {what: statistics.mean(run[what] for run in found) for what in ("accuracy", "seconds")}
        for name, found in runs.items()
    }
    benchmark.extra_info["runs"] = {
        name: [{what: value for what, value in run.items() if what != "correct"} for run in found]
        for name, found in runs.items()
    }
    benchmark.extra_info["ladder_minus_lora"] = gap
    points = [100 * gap[what] for what in ("mean", "low", "high")]
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy, {task.upper()}, MiniLM-L6, mean of {len(SEEDS)} seeds",
        "ours": f"{100 * mean[ladder]['accuracy']:.1f} % in {mean[ladder]['seconds']:.0f} s, the whole command; minus "
        f"LoRA {points[0]:+.1f} points, 95 % interval {points[1]:+.1f} to {points[2]:+.1f} (paired bootstrap)",
        "peer": f"{peer}, r={lora.RANK}, {100 * mean[peer]['accuracy']:.1f} % in {mean[peer]['seconds']:.0f} s of "
        f"training and dev, linear probe {100 * mean[probe]['accuracy']:.1f} %",
        "how": f"tlfast ladder train --backbone minilm --reduction {REDUCTION} {' '.join(LADDER)} --cache DIR",
    }
