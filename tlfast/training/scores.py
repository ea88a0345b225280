"""What logits are worth: one scoring a kind of label, each saying what it keeps of a batch and what that is worth."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

Scores = dict[str, float | int | None]


class Scoring(ABC):
    """How a model is scored. metric: what dev selects by; more_is_better: whether its larger values are.

    largest_batch: the most examples in one forward, where the logits of more would take too much memory.
    """

    metric: str
    more_is_better: bool
    largest_batch: ClassVar[float] = math.inf

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What of a batch the model reads when it is scored."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What is kept of a batch: (B, ...), one entry an example."""
        return logits.float()

    @abstractmethod
    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """The scores of all examples, from what was kept of each and its labels (padded or not)."""

    def test_scores(self, model: nn.Module, dataset: Any, collate: Any) -> Scores:
        """What is measured on a test file beside `score`, and is too slow for every epoch."""
        return {}


class ClassScoring(Scoring):
    """Classes: logits (N, C), labels (N,) int."""

    metric, more_is_better = "accuracy", True

    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """Accuracy in [0, 1] and mean cross-entropy."""
        values, classes = np.asarray(kept, dtype=np.float64), np.asarray(labels, dtype=np.int64)
        shifted = values - values.max(axis=1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(classes)), classes]
        return {"accuracy": float(np.mean(values.argmax(axis=1) == classes)), "loss": float(np.mean(losses))}


class NumberScoring(Scoring):
    """Regression: logits (N, 1), labels (N,) float."""

    metric, more_is_better = "mse", False

    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """Pearson's r, None where predictions or targets do not vary, and mean squared error."""
        predicted, wanted = np.asarray(kept, dtype=np.float64).reshape(-1), np.asarray(labels, dtype=np.float64)
        return {"pearson": _pearson(predicted, wanted), "mse": float(np.mean((predicted - wanted) ** 2))}


class SetScoring(Scoring):
    """Any number of classes a row: logits (N, C), labels (N, C) of 0 and 1; a class is predicted above 0."""

    metric, more_is_better = "micro_f1", True

    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """Accuracy (of whole sets), F1 over all decisions and as the mean over classes, mean binary cross-entropy.

        The F1 of a class that is neither there nor predicted is 0, as in scikit-learn.
        """
        logits, wanted = np.asarray(kept, dtype=np.float64), np.asarray(labels) > 0.5
        predicted = logits > 0
        hits, made, true = (np.sum(x, axis=0) for x in (predicted & wanted, predicted, wanted))
        losses = np.logaddexp(0, np.where(wanted, -logits, logits))
        return {
            "accuracy": float(np.mean(np.all(predicted == wanted, axis=1))),
            "micro_f1": _f1(hits.sum(), made.sum(), true.sum()),
            "macro_f1": float(np.mean([_f1(*counts) for counts in zip(hits, made, true, strict=True)])),
            "loss": float(np.mean(losses)),
        }


def precision_recall_f1(hits: int, predicted: int, true: int) -> tuple[float, float, float]:
    """Shares of what was predicted and of what is true that were hit, and their harmonic mean; 0 where undefined."""
    precision, recall = hits / predicted if predicted else 0.0, hits / true if true else 0.0
    return float(precision), float(recall), _f1(hits, predicted, true)


def _f1(hits: float, predicted: float, true: float) -> float:
    return float(2 * hits / (predicted + true)) if predicted + true else 0.0


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / scale if scale > 0 else None
