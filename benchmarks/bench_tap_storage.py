"""What a tap storage costs in accuracy and saves in memory: `tlfast ladder train --tap-storage` beside LoRA, MiniLM.

SST-2 and TREC, three seeds each. The ladder is bench_accuracy's; runs of a seed, which may split dev from the training
file, share an exact cache of taps, so that the storages are trained on the same numbers. "offload" and "stream" are not
here: their gradients are those of "keep". Memory is what a training forward of 32 x 64 tokens keeps for its backward
pass. LoRA's runs are those of bench_accuracy. Each result is kept in .benchmarks/, and a suite that was broken off goes
on from there. The data are in $TLFAST_DATA/text.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tlfast
from benchmarks import lora
from benchmarks.bench_accuracy import LADDER, REDUCTION, correct_answers, lora_run, probe_run, spent
from benchmarks.kept import kept
from benchmarks.runs import text_files, train_ladder
from tlfast.bench.comparison import difference
from tlfast.bench.measure import saved_bytes
from tlfast.cli.backbone import load_backbone

SEEDS = (0, 1, 2)
STORAGES = ("keep", "int8", "project")
BATCH, LENGTH, MIB = 32, 64, 2**20


def storage_run(task: str, storage: str, seed: int, folder: Path) -> dict[str, Any]:
    """The command on the seed's cache."""
    files, out = text_files(task), folder / f"{task}-{storage}-{seed}"
    options = (*LADDER.split(), "--cache", str(folder / f"{task}-taps-{seed}"), "--cache-storage", "exact")
    metrics, took = spent(
        lambda: train_ladder(files, seed, out, *options, "--tap-storage", storage, reduction=REDUCTION)
    )
    correct = correct_answers(out, files["test"])
    assert sum(correct) / len(correct) == metrics["accuracy"]
    return {"accuracy": metrics["accuracy"], **took, "correct": correct}


def saved_mib(storage: str) -> float:
    """MiB a sample that the ladder's training forward keeps."""
    config = tlfast.LadderConfig(reduction=REDUCTION, init="random", side_precision="bf16", tap_storage=storage)
    frozen = tlfast.freeze(load_backbone("minilm").model, precision="bf16")
    return _saved(tlfast.LadderModel(frozen, config=config, calibration=[_batch()]))


def lora_mib() -> float:
    """The same of LoRA under bf16 autocast."""
    return _saved(lora.model(2, "bf16 autocast"))


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 2000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def _saved(model: torch.nn.Module) -> float:
    batch = _batch()
    model.train()
    model(**batch).loss.backward()  # what is made once
    model.zero_grad(set_to_none=True)
    return saved_bytes(lambda: model(**batch)) / BATCH / MIB


@pytest.mark.parametrize("task", ["sst2", "trec"])
def test_tap_storage(benchmark: Any, tmp_path: Path, task: str) -> None:
    text_files(task)  # skips where there are none
    runs: dict[str, list[dict[str, Any]]] = {}

    def all_runs() -> None:
        for storage in STORAGES:
            runs[storage] = [
                kept("tap_storage", f"{task} {storage} {s}", lambda s=s, t=storage: storage_run(task, t, s, tmp_path))
                for s in SEEDS
            ]
        runs["LoRA"] = [
            kept("accuracy", f"{task} LoRA bf16 autocast {s}", lambda s=s: lora_run(task, "bf16 autocast", s, tmp_path))
            for s in SEEDS
        ]
        runs["linear probe"] = [kept("accuracy", f"{task} probe {s}", lambda s=s: probe_run(task, s)) for s in SEEDS]

    benchmark.pedantic(all_runs, rounds=1)
    mib = {storage: saved_mib(storage) for storage in STORAGES} | {"LoRA": lora_mib()}
    accuracy = {name: statistics.mean(run["accuracy"] for run in found) for name, found in runs.items()}
    costs = {
        storage: difference(*(np.array([run["correct"] for run in runs[name]]) for name in (storage, "keep")))
        for storage in STORAGES[1:]
    }
    benchmark.extra_info["accuracy"], benchmark.extra_info["mib"] = accuracy, mib
    benchmark.extra_info["tradeoff"] = {
        "what": f"{task.upper()}, MiniLM-L6",
        "cost": f"MiB kept for the backward pass, a sample of {LENGTH} tokens",
        "points": {f"ladder, {name}" if name in STORAGES else name: [mib[name], accuracy[name]] for name in mib},
    }
    benchmark.extra_info["minus_keep"] = costs

    def ours(storage: str) -> str:
        text = f"{storage} {100 * accuracy[storage]:.1f} % ({mib[storage]:.2f} MiB"
        if storage in costs:
            low, mean, high = (100 * costs[storage][what] for what in ("low", "mean", "high"))
            text += f"; {mean:+.2f} points, {low:+.2f} to {high:+.2f}"
        return f"{text})"

    benchmark.extra_info["row"] = {
        "what": f"Test accuracy by tap storage, {task.upper()}, MiniLM-L6, r={REDUCTION}, mean of {len(SEEDS)} seeds "
        f"(saved for backward a sample of {LENGTH} tokens; paired bootstrap against keep)",
        "ours": ", ".join(ours(storage) for storage in STORAGES),
        "peer": f"LoRA r={lora.RANK} {100 * accuracy['LoRA']:.1f} % ({mib['LoRA']:.1f} MiB), "
        f"linear probe {100 * accuracy['linear probe']:.1f} %",
        "how": f"tlfast ladder train --backbone minilm --reduction {REDUCTION} {LADDER} --cache DIR --tap-storage NAME",
    }
