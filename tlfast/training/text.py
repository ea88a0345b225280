"""A task on labelled texts: from files to tokenised data, and from a trained model to the files of a run."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import Examples, InputError, Labels, PadBatch, TokenDataset, fit_labels, read_examples, split_dev
from .curve import draw_curve
from .folder import RunFolder
from .scores import evaluate, selection_metric
from .trainer import Fit, Settings, TaskData

TASK, TOKENIZER, CURVE = "task.json", "tokenizer", "curve.png"
_CALIBRATION_TEXTS = 256
_SCORED_TRAINING_TEXTS = 2000


@dataclass(frozen=True)
class Columns:
    """Names in the header of a data file."""

    text: str = "text"
    label: str = "label"
    pair: str = "text_pair"


@dataclass(frozen=True)
class TextTask:
    """What is needed to read further files for a trained model; saved beside it as task.json.

    pairs: whether the model reads two texts. max_length: tokens, special ones included. backbone: name or folder.
    """

    labels: Labels
    columns: Columns
    pairs: bool
    max_length: int
    backbone: str

    def read(self, path: str | Path, labelled: bool) -> Examples:
        """Read a file as the training file was read; without labels it need not have the column."""
        label = self.columns.label if labelled else None
        return read_examples(path, self.columns.text, label, self.columns.pair, self.pairs)

    def dataset(self, examples: Examples, tokenizer: Any) -> TokenDataset:
        """Tokenise, with targets where the examples have labels."""
        targets = None if examples.labels is None else self.labels.encode(examples)
        return TokenDataset.tokenise(examples, tokenizer, self.max_length, targets)

    def save(self, folder: Path) -> None:
        """Write task.json."""
        (folder / TASK).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> TextTask:
        """Read task.json; InputError where the folder holds no trained model or the file is damaged."""
        path = folder / TASK
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder; pass the --out of a training run")
        if not path.is_file():
            raise InputError(f"{folder}: holds no trained model ({TASK} is missing); pass the --out of a finished run")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            labels, columns = Labels(tuple(saved["labels"]["names"])), Columns(**saved["columns"])
            return cls(labels, columns, saved["pairs"], saved["max_length"], saved["backbone"])
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            raise InputError(f"{path}: the file is damaged; train again") from None


def prepare(
    train_file: str | Path,
    dev_file: str | Path | None,
    columns: Columns,
    tokenizer: Any,
    max_length: int,
    seed: int,
    backbone: str = "",
    pairs: bool | None = None,
) -> tuple[TextTask, TaskData]:
    """Read and tokenise the training and dev data; without a dev file a seeded tenth of the training data is dev.

    pairs: True: the column of second texts must be there; None: it is read where it is.
    Raises InputError for anything wrong with the files.
    """
    train = read_examples(train_file, columns.text, columns.label, columns.pair, pairs)
    labels = fit_labels(train)
    task = TextTask(labels, columns, train.pairs is not None, max_length, backbone)
    if dev_file is None:
        train, dev = split_dev(train, seed)
    else:
        dev = task.read(dev_file, labelled=True)
    pad = PadBatch.of(tokenizer, max_length)
    return task, TaskData(task.dataset(train, tokenizer), task.dataset(dev, tokenizer), pad, labels.regression)


def calibration_batches(data: TaskData, seed: int, batch_size: int = 32) -> list[dict[str, torch.Tensor]]:
    """Up to 256 training texts, drawn by the seed, as batches of model inputs without labels."""
    count = min(_CALIBRATION_TEXTS, len(data.train))
    drawn = data.train.select(random.Random(seed).sample(range(len(data.train)), count))
    drawn.columns.pop("labels", None)
    return [data.pad([drawn[j] for j in range(i, min(i + batch_size, count))]) for i in range(0, count, batch_size)]


def typical_batch(data: TaskData, batch_size: int) -> dict[str, torch.Tensor]:
    """A training batch, with labels, of the texts whose lengths are in the middle: what a step usually holds."""
    order = sorted(range(len(data.train)), key=lambda i: data.train.lengths[i])
    start = max(0, (len(order) - batch_size) // 2)
    return data.pad([data.train[i] for i in order[start : start + batch_size]])


def results(fit: Fit, data: TaskData, test: TokenDataset, settings: Settings) -> dict[str, Any]:
    """What metrics.json says of a training run: scores on train, dev and test, the trials, seconds an epoch.

    train is scored on at most 2,000 examples, drawn by the seed; every `n` says on how many.
    """
    count = min(_SCORED_TRAINING_TEXTS, len(data.train))
    drawn = data.train.select(random.Random(settings.seed).sample(range(len(data.train)), count))
    metric, _ = selection_metric(data.regression)
    seconds = fit.chosen.epoch_seconds
    test_scores = evaluate(fit.model, test, data.pad, data.regression)
    headline = {} if data.regression else {"accuracy": test_scores["accuracy"]}
    return {
        **headline,
        "train": evaluate(fit.model, drawn, data.pad, data.regression),
        "dev": fit.dev,
        "test": test_scores,
        "selected_by": f"dev {metric}",
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


def write_results(
    run: RunFolder, fit: Fit, task: TextTask, tokenizer: Any, metrics: dict[str, Any], title: str
) -> None:
    """Put the model, tokenizer, task.json, curve.png and metrics.json into the run's folder: all of them or none."""
    metric, _ = selection_metric(task.labels.regression)
    with run.publish() as folder:
        fit.model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder / TOKENIZER)
        task.save(folder)
        draw_curve(folder / CURVE, fit.chosen.history, metric, fit.chosen.best_epoch, title)
        run.write_metrics(folder, metrics)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, by which a resumed run knows its data again."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def predictions(task: TextTask, logits: np.ndarray) -> list[dict[str, Any]]:
    """One dict a row: `prediction`, the class's name with its `probability`, or the number."""
    values = torch.from_numpy(logits)
    if task.labels.regression:
        return [{"prediction": value} for value in values.reshape(-1).tolist()]
    probabilities, classes = values.softmax(dim=-1).max(dim=-1)
    pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
    return [{"prediction": task.labels.names[index], "probability": p} for index, p in pairs]
