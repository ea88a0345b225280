"""peft LoRA on MiniLM for classification, trained by the Trainer that trains ladders, on the same tokenised data.

python -m benchmarks.lora TASK PRECISION SEED FOLDER prints what `train_lora` returns as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.runs import text_files
from tlfast import training
from tlfast.cli.backbone import find_backbone, load_backbone

RANK, RATE, BATCH = 8, 1e-3, 32
EPOCHS = {"sst2": 2, "trec": 3}
PRECISIONS = ("fp32", "bf16 autocast")


def model(num_labels: int, precision: str) -> nn.Module:
    """LoRA on query and value, with a new head."""
    whole = AutoModelForSequenceClassification.from_pretrained(find_backbone("minilm"), num_labels=num_labels)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
    made: Any = get_peft_model(whole, config)
    made.forward = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast")(made.forward)
    return made


def train_lora(
    files: dict[str, Path | None], epochs: int, seed: int, out: Path, precision: str = "fp32"
) -> dict[str, Any]:
    """One run; dev selects the epoch, then the test file is read.

    fit_seconds: of training and of dev's evaluations, without imports and loading; fit_cpu_seconds: of all threads in
    it. correct: of each test example.
    """
    loaded = load_backbone("minilm")
    task = training.TextTask(loaded.max_length, "minilm")
    task, data = training.load_data(task, files["train"], files["dev"], loaded.tokenizer, seed)
    settings = training.Settings(epochs=epochs, batch_size=BATCH, learning_rates=(RATE,), seed=seed)
    start, cpu = time.perf_counter(), time.process_time()
    fit = training.fit(lambda: model(task.num_labels, precision), data, settings, out)
    spent = {"fit_seconds": time.perf_counter() - start, "fit_cpu_seconds": time.process_time() - cpu}
    test = task.dataset(task.read(files["test"], labelled=True), loaded.tokenizer)
    predicted = training.predict_logits(fit.model, test, data.collate).argmax(axis=1)
    correct = [bool(p == label) for p, label in zip(predicted, test.labels, strict=True)]
    return {
        "accuracy": sum(correct) / len(correct),
        "dev": fit.dev["accuracy"],
        **spent,
        "epoch_seconds": list(fit.chosen.epoch_seconds),
        "correct": correct,
    }


if __name__ == "__main__":
    name, how, drawn, folder = sys.argv[1:]
    print(json.dumps(train_lora(text_files(name), EPOCHS[name], int(drawn), Path(folder), how)))
