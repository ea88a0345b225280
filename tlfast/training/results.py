"""What a finished training run says of itself, and the files it leaves."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch

from .curve import draw_curve
from .evaluation import LabelledDataset, evaluate, evaluate_test
from .folder import RunFolder
from .tasks.base import Task
from .trainer import Fit, Settings, TaskData

CURVE = "curve.png"
_CALIBRATION_EXAMPLES = 256
_SCORED_TRAINING_EXAMPLES = 2000


def calibration_batches(data: TaskData, seed: int, batch_size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Up to 256 training examples, drawn by the seed, as batches with labels, which an encoder-decoder reads too."""
    count = min(_CALIBRATION_EXAMPLES, len(data.train))
    drawn = data.train.select(random.Random(seed).sample(range(len(data.train)), count))
    return [data.collate([drawn[j] for j in range(i, min(i + batch_size, count))]) for i in range(0, count, batch_size)]


def typical_batch(data: TaskData, batch_size: int) -> dict[str, torch.Tensor]:
    """A training batch, with labels, of the examples of middling length: what a step usually holds."""
    order = sorted(range(len(data.train)), key=lambda i: data.train.lengths[i])
    start = max(0, (len(order) - batch_size) // 2)
    return data.collate([data.train[i] for i in order[start : start + batch_size]])


def batch_shape(batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many samples a batch has and how large they are, in tokens or pixels."""
    if "pixel_values" in batch:
        samples, _, height, width = batch["pixel_values"].shape
        return {"samples": samples, "height": height, "width": width}
    if batch["input_ids"].dim() == 3:
        samples, choices, tokens = batch["input_ids"].shape
        return {"samples": samples, "choices": choices, "tokens": tokens}
    samples, tokens = batch["input_ids"].shape
    return {"samples": samples, "tokens": tokens}


def results(fit: Fit, data: TaskData, test: LabelledDataset, settings: Settings) -> dict[str, Any]:
    """What metrics.json says of a training run: scores on train, dev and test, the trials, seconds an epoch.

    train is scored on at most 2,000 examples, drawn by the seed; every `n` says on how many.
    """
    count = min(_SCORED_TRAINING_EXAMPLES, len(data.train))
    drawn = data.train.select(random.Random(settings.seed).sample(range(len(data.train)), count))
    seconds = fit.chosen.epoch_seconds
    test_scores = evaluate_test(fit.model, test, data.collate, data.scoring)
    headline = {"accuracy": test_scores["accuracy"]} if "accuracy" in test_scores else {}
    return {
        **headline,
        "train": evaluate(fit.model, drawn, data.collate, data.scoring),
        "dev": fit.dev,
        "test": test_scores,
        "selected_by": f"dev {data.scoring.metric}",
        "learning_rate": fit.chosen.learning_rate,
        "best_epoch": fit.chosen.best_epoch,
        "trials": [{"learning_rate": trial.learning_rate, "dev": trial.dev} for trial in fit.trials],
        "epochs": settings.epochs,
        "seconds_per_epoch": sum(seconds) / len(seconds),
        "epoch_seconds": list(seconds),
        "trained_parameters": sum(p.numel() for p in fit.model.parameters() if p.requires_grad),
        "examples": {"train": len(data.train), "dev": len(data.dev), "test": len(test)},
        "truncated": {"train": data.train.truncated, "dev": data.dev.truncated, "test": test.truncated},
    }


def write_results(run: RunFolder, fit: Fit, task: Task, preprocessor: Any, metrics: dict[str, Any], title: str) -> None:
    """Put model, preprocessor, task.json, curve.png and metrics.json into the run's folder: all of them or none."""
    metric = task.scoring(preprocessor).metric
    with run.publish() as folder:
        fit.model.save_pretrained(folder)  # type: ignore[operator]
        preprocessor.save_pretrained(folder / task.preprocessor_folder)
        task.save(folder)
        draw_curve(folder / CURVE, fit.chosen.history, metric, fit.chosen.best_epoch, title)
        run.write_metrics(folder, metrics)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names, by which a resumed run knows its data again."""
    path = Path(path)
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = "".join(f"{file.relative_to(path).as_posix()}\0{file_digest(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()
