"""Logits of a whole dataset, and the scores of a model on it, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .scores import Scores, Scoring

Batch = dict[str, torch.Tensor]
Collate = Callable[[list[dict[str, Any]]], Batch]

_BATCH_SIZE = 64


class LabelledDataset(Protocol):
    """Examples as a model reads them. labels: of each; lengths: alike for what makes a well-filled batch together.

    truncated: how many examples lost a part to the model's greatest length.
    """

    lengths: list[int]

    @property
    def labels(self) -> list: ...

    @property
    def truncated(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def select(self, indices: list[int]) -> LabelledDataset:
        """The examples at `indices`, in that order."""


def predict_logits(
    model: nn.Module, dataset: LabelledDataset, collate: Collate, batch_size: int = _BATCH_SIZE
) -> np.ndarray:
    """Logits (N, num_labels) float32 in the dataset's order, in eval mode."""
    rows: list[np.ndarray] = [np.empty(0)] * len(dataset)
    with evaluating(model), torch.no_grad():
        for indices, batch in _batches(dataset, collate, batch_size):
            batch.pop("labels", None)
            for i, row in zip(indices, _logits(model, batch).float().cpu().numpy(), strict=True):
                rows[i] = row
    return np.stack(rows)


def keep(model: nn.Module, dataset: LabelledDataset, collate: Collate, scoring: Scoring) -> list[np.ndarray]:
    """What the scoring keeps of each example, in the dataset's order."""
    rows: list[np.ndarray] = [np.empty(0)] * len(dataset)
    with evaluating(model), torch.no_grad():  # once: a model may keep something from its first batch to its last
        for indices, batch in _batches(dataset, collate, int(min(_BATCH_SIZE, scoring.largest_batch))):
            logits = _logits(model, scoring.inputs(batch))
            kept = scoring.reduce(logits, batch["labels"].to(logits.device)).cpu().numpy()
            for i, row in zip(indices, kept, strict=True):
                rows[i] = row
    return rows


def evaluate(model: nn.Module, dataset: LabelledDataset, collate: Collate, scoring: Scoring) -> Scores:
    """Score a model on a dataset with labels; `n` is the number of examples."""
    kept = keep(model, dataset, collate, scoring)
    return {**scoring.score(kept, dataset.labels), "n": len(dataset)}


def evaluate_test(model: nn.Module, dataset: LabelledDataset, collate: Collate, scoring: Scoring) -> Scores:
    """`evaluate`, and what is measured on test files alone."""
    return evaluate(model, dataset, collate, scoring) | scoring.test_scores(model, dataset, collate)


def _batches(dataset: LabelledDataset, collate: Collate, size: int) -> Iterator[tuple[list[int], Batch]]:
    """Indices and batches, the longest examples first: what does not fit into memory shows at once."""
    order = sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i])
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, collate([dataset[i] for i in chosen])


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode for the time of a `with` block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
