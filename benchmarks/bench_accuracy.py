"""Test accuracy in the time LoRA takes: `tlfast ladder train`, LoRA and a linear probe on SST-2 and TREC, MiniLM.

Five seeds each. The ladder is the README's command for a cache of taps (reduction 2 from principal components, products
in bf16, 3 epochs at 5e-4, averages of the weights), chosen by cross-validation on training and dev data; every run
fills its cache anew. LoRA: r=8 on query and value, lr 1e-3, batch 32, 2 epochs on SST-2 and 3 on TREC, in float32 or in
bf16 autocast, whichever the first seed finds faster. Dev selects the epoch of both, and the test file is read once. A
run takes minutes, so each result is kept in .benchmarks/accuracy.json, and a suite that was broken off goes on from
there; remove that file to train anew. What a run takes is that of a whole process, from imports to the test file:
processor time, which other work on the machine changes less, and beside it the clock's. The data are in
$TLFAST_DATA/text.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tlfast
from benchmarks import lora
from benchmarks.kept import kept
from benchmarks.runs import ROOT, text_files, train_ladder
from tlfast import training
from tlfast.bench.comparison import difference
from tlfast.bench.probe import fit_probe
from tlfast.cli.backbone import load_backbone

SEEDS = (0, 1, 2, 3, 4)
REDUCTION = 2
LADDER = "--init pca --precision bf16 --side-precision bf16 --epochs 3 --lr 5e-4 --average 0.998"

Run = dict[str, Any]


def spent(run: Callable[[], Run]) -> tuple[Run, dict[str, float]]:
    """What a process of its own gives, and its seconds from start to end: by the clock, and of all its threads."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, {"seconds": seconds, "cpu_seconds": cpu_seconds}


def ladder_run(task: str, seed: int, folder: Path) -> Run:
    """The command, which fills its cache, selects by dev and reads the test file."""
    files, out, taps = text_files(task), folder / f"{task}-{seed}", folder / f"{task}-{seed}-taps"
    options = (*LADDER.split(), "--cache", str(taps))
    metrics, took = spent(lambda: train_ladder(files, seed, out, *options, reduction=REDUCTION))
    correct = correct_answers(out, files["test"])
    assert sum(correct) / len(correct) == metrics["accuracy"]
    return {
        "accuracy": metrics["accuracy"],
        "dev": metrics["dev"]["accuracy"],
        "best_epoch": metrics["best_epoch"],
        **took,
        "cache_seconds": metrics["cache"]["seconds"],
        "epoch_seconds": metrics["epoch_seconds"],
        "correct": correct,
    }


def correct_answers(folder: Path, test_file: Path) -> list[bool]:
    """Which test examples the ladder in a run's folder classifies correctly."""
    task, loaded = training.load_task(folder), load_backbone("minilm")
    test = task.dataset(task.read(test_file, labelled=True), loaded.tokenizer)
    model = tlfast.LadderModel.from_pretrained(folder, backbone=loaded.model)
    predicted = training.predict_logits(model, test, task.collate(loaded.tokenizer)).argmax(axis=1)
    return [bool(p == label) for p, label in zip(predicted, test.labels, strict=True)]


def probe_run(task: str, seed: int) -> Run:
    """The linear probe, in this process: what it takes is of fitting alone."""
    loaded, files = load_backbone("minilm"), text_files(task)
    kind, data = training.load_data(
        training.TextTask(loaded.max_length, "minilm"), files["train"], files["dev"], loaded.tokenizer, seed
    )
    start, cpu = time.perf_counter(), time.process_time()
    probe = fit_probe(tlfast.freeze(loaded.model), data)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    test = kind.dataset(kind.read(files["test"], labelled=True), loaded.tokenizer)
    return {"accuracy": training.evaluate(probe, test, data.collate, data.scoring)["accuracy"], **took}


def lora_run(task: str, precision: str, seed: int, folder: Path) -> Run:
    """LoRA in a process of its own, as the command has one."""
    out = folder / f"{task}-{precision}-{seed}"
    command = [sys.executable, "-m", "benchmarks.lora", task, precision, str(seed), str(out)]

    def run() -> Run:
        return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    found, took = spent(run)
    return found | took


def _all_runs(task: str, folder: Path) -> dict[str, list[Run]]:
    def run_lora(precision: str, seed: int) -> Run:
        return kept("accuracy", f"{task} LoRA {precision} {seed}", lambda: lora_run(task, precision, seed, folder))

    def run(what: str, seed: int) -> Run:
        make = {"ladder": lambda: ladder_run(task, seed, folder), "probe": lambda: probe_run(task, seed)}[what]
        return kept("accuracy", f"{task} {what} {seed}", make)

    faster = min(lora.PRECISIONS, key=lambda precision: run_lora(precision, SEEDS[0])["cpu_seconds"])
    return {
        "ladder": [run("ladder", seed) for seed in SEEDS],
        f"LoRA in {faster}": [run_lora(faster, seed) for seed in SEEDS],
        "linear probe": [run("probe", seed) for seed in SEEDS],
    }


@pytest.mark.parametrize("task", ["sst2", "trec"])
def test_accuracy(benchmark: Any, tmp_path: Path, task: str) -> None:
    text_files(task)  # skips where there are none
    runs: dict[str, list[Run]] = {}
    benchmark.pedantic(lambda: runs.update(_all_runs(task, tmp_path)), rounds=1)
    ladder, peer, probe = runs
    gap = difference(*(np.array([run["correct"] for run in runs[name]]) for name in (ladder, peer)))
    mean = {
        name: {what: statistics.mean(run[what] for run in found) for what in ("accuracy", "cpu_seconds", "seconds")}
        for name, found in runs.items()
    }
    benchmark.extra_info["runs"] = {
        name: [{what: value for what, value in run.items() if what != "correct"} for run in found]
        for name, found in runs.items()
    }
    benchmark.extra_info["mean"] = mean
    benchmark.extra_info["ladder_minus_lora"] = gap
    benchmark.extra_info["tradeoff"] = {
        "what": f"{task.upper()}, MiniLM-L6",
        "cost": "processor seconds of a training run",
        "points": {name: [mean[name]["cpu_seconds"], mean[name]["accuracy"]] for name in runs},
    }
    points = [100 * gap[what] for what in ("mean", "low", "high")]
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy, {task.upper()}, MiniLM-L6, mean of {len(SEEDS)} seeds (processor time of a run)",
        "ours": f"{100 * mean[ladder]['accuracy']:.1f} % in {mean[ladder]['cpu_seconds']:.0f} s; minus "
        f"LoRA {points[0]:+.1f} points, 95 % interval {points[1]:+.1f} to {points[2]:+.1f} (paired bootstrap)",
        "peer": f"{peer}, r={lora.RANK}, {100 * mean[peer]['accuracy']:.1f} % in {mean[peer]['cpu_seconds']:.0f} s, "
        f"linear probe {100 * mean[probe]['accuracy']:.1f} %",
        "how": f"tlfast ladder train --backbone minilm --reduction {REDUCTION} {LADDER} --cache DIR",
    }
