"""Logits of a whole dataset, and what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import PadBatch, TokenDataset


def predict_logits(model: nn.Module, dataset: TokenDataset, pad: PadBatch, batch_size: int = 64) -> np.ndarray:
    """Logits (N, num_labels) float32 in the dataset's order, in eval mode."""
    device = next(model.parameters()).device
    order = sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i])
    parts = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = pad([dataset[i] for i in order[start : start + batch_size]])
            batch.pop("labels", None)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            parts.append(logits.float().cpu().numpy())
    model.train(was_training)
    logits = np.empty((len(order), parts[0].shape[-1]), dtype=np.float32)
    logits[order] = np.concatenate(parts)
    return logits


def score(logits: np.ndarray, targets: Sequence[int | float], regression: bool) -> dict[str, float | None]:
    """Accuracy in [0, 1] and mean cross-entropy, or Pearson's r and mean squared error; computed in float64.

    Pearson's r is None where predictions or targets do not vary.
    """
    values = np.asarray(logits, dtype=np.float64)
    if regression:
        predicted, wanted = values.reshape(-1), np.asarray(targets, dtype=np.float64)
        return {"pearson": _pearson(predicted, wanted), "mse": float(np.mean((predicted - wanted) ** 2))}
    classes = np.asarray(targets, dtype=np.int64)
    shifted = values - values.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(classes)), classes]
    return {"accuracy": float(np.mean(values.argmax(axis=1) == classes)), "loss": float(np.mean(losses))}


def evaluate(model: nn.Module, dataset: TokenDataset, pad: PadBatch, regression: bool) -> dict[str, float | int | None]:
    """Score a model on a dataset with labels; `n` is the number of examples."""
    return {**score(predict_logits(model, dataset, pad), dataset.columns["labels"], regression), "n": len(dataset)}


def selection_metric(regression: bool) -> tuple[str, bool]:
    """What the dev set selects by: its name, and whether more is better."""
    return ("mse", False) if regression else ("accuracy", True)


def trainer_metrics(regression: bool) -> Any:
    """`score` in the form transformers.Trainer calls it."""

    def compute(prediction: Any) -> dict[str, float | None]:
        logits = prediction.predictions
        return score(logits[0] if isinstance(logits, tuple) else logits, prediction.label_ids, regression)

    return compute


def _pearson(a: np.ndarray, b: np.ndarray) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / scale if scale > 0 else None
