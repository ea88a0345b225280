"""Test accuracy on SST-2 and TREC with MiniLM: `tlfast ladder train` as a user runs it, peft LoRA, a linear probe.

Three seeds each. The command has its defaults but for reduction 4; dev selects the epoch, the test file is read once.
LoRA: r=8 on query and value, lr 1e-3, batch 32, 2 epochs on SST-2 and 3 on TREC, selected by the same dev data through
the same Trainer. The data are in $TLFAST_DATA/text.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

import tlfast
from benchmarks.runs import SEEDS, text_files, train_ladder
from tlfast import training
from tlfast.bench.probe import fit_probe
from tlfast.cli.backbone import find_backbone, load_backbone

LORA_EPOCHS = {"sst2": 2, "trec": 3}


def _peers(files: dict[str, Path | None], epochs: int, seed: int, out: Path) -> dict[str, dict[str, float]]:
    """The linear probe and LoRA on the same tokenised data."""
    loaded = load_backbone("minilm")
    task = training.TextTask(loaded.max_length, "minilm")
    task, data = training.load_data(task, files["train"], files["dev"], loaded.tokenizer, seed)
    test = task.dataset(task.read(files["test"], labelled=True), loaded.tokenizer)
    start = time.perf_counter()
    probe = fit_probe(tlfast.freeze(loaded.model), data)
    found = {
        "probe": {
            "accuracy": training.evaluate(probe, test, data.collate, data.scoring)["accuracy"],
            "seconds": time.perf_counter() - start,
        }
    }

    def lora() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(find_backbone("minilm"), num_labels=task.num_labels)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
        return get_peft_model(model, config)

    fit = training.fit(lora, data, training.Settings(epochs=epochs, seed=seed), out)
    accuracy = training.evaluate(fit.model, test, data.collate, data.scoring)["accuracy"]
    found["LoRA"] = {"accuracy": accuracy, "seconds": sum(fit.chosen.epoch_seconds)}
    return found


@pytest.mark.parametrize("task", ["sst2", "trec"])
def test_accuracy(benchmark, tmp_path, task):
    files = text_files(task)
    runs = []

    def all_seeds() -> None:
        for seed in SEEDS:
            peers = _peers(files, LORA_EPOCHS[task], seed, tmp_path / f"lora-{seed}")
            metrics = train_ladder(files, seed, tmp_path / f"ladder-{seed}")
            ladder = {"accuracy": metrics["accuracy"], "seconds": sum(metrics["epoch_seconds"])}
            runs.append({"ladder": ladder | {"dev": metrics["dev"]["accuracy"]}, **peers})

    benchmark.pedantic(all_seeds, rounds=1)
    mean = {
        method: {what: statistics.mean(run[method][what] for run in runs) for what in ("accuracy", "seconds")}
        for method in ("ladder", "LoRA", "probe")
    }
    benchmark.extra_info["runs"] = runs
    benchmark.extra_info["row"] = {
        "what": f"Test accuracy, {task.upper()}, MiniLM-L6, mean of {len(SEEDS)} seeds (training seconds)",
        "ours": f"{100 * mean['ladder']['accuracy']:.1f} % ({mean['ladder']['seconds']:.0f} s)",
        "peer": f"LoRA r=8, lr 1e-3 {100 * mean['LoRA']['accuracy']:.1f} % ({mean['LoRA']['seconds']:.0f} s), "
        f"linear probe {100 * mean['probe']['accuracy']:.1f} %",
        "how": "tlfast ladder train --backbone minilm --reduction 4",
    }
