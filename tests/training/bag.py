"""A model small enough to train in a second, and data for it."""

from __future__ import annotations

import signal

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tlfast.data import PadBatch, TokenDataset
from tlfast.training import Settings, TaskData
from tlfast.training.scores import ClassScoring, NumberScoring

WORDS = 40
SETTINGS = Settings(epochs=3, batch_size=8, learning_rates=(0.1,), seed=1)


class Bag(nn.Module):
    """Mean of word vectors with dropout, then a linear layer; counts its training steps and can be hit by a signal."""

    def __init__(self, outputs: int = 2, stop_at: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, outputs)
        self.steps, self.stop_at = 0, stop_at

    def forward(self, input_ids, attention_mask, labels=None):
        if self.training:
            self.steps += 1
            if self.steps == self.stop_at:
                signal.raise_signal(signal.SIGINT)
        weights = attention_mask[..., None].float()
        mean = (self.embedding(input_ids) * weights).sum(1) / weights.sum(1)
        logits = self.head(self.dropout(mean))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if logits.shape[-1] == 1:
            return SequenceClassifierOutput(loss=nn.functional.mse_loss(logits[:, 0], labels), logits=logits)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def make_dataset(count: int, seed: int, regression: bool = False) -> TokenDataset:
    """Word lists of 3 to 19 words; the label is whether their mean is in the upper half, or the mean, scaled."""
    random = np.random.default_rng(seed)
    ids = [random.integers(0, WORDS, random.integers(3, 20)).tolist() for _ in range(count)]
    means = [float(np.mean(row)) for row in ids]
    labels = [(mean - WORDS / 2) / 3 for mean in means] if regression else [int(mean >= WORDS / 2) for mean in means]
    return TokenDataset({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})


def make_data(regression: bool = False) -> TaskData:
    pad = PadBatch(pad_token_id=0, pad_token_type_id=0, max_length=32)
    scoring = NumberScoring() if regression else ClassScoring()
    return TaskData(make_dataset(60, 0, regression), make_dataset(30, 1, regression), pad, scoring)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_fit(a, b) -> None:
    for name, tensor in state(a.model).items():
        assert torch.equal(tensor, b.model.state_dict()[name]), name
    assert a.dev == b.dev
    assert (a.chosen.dev, a.chosen.best_epoch) == (b.chosen.dev, b.chosen.best_epoch)
    last = [[e for e in f.chosen.history if "eval_accuracy" in e] for f in (a, b)]
    assert [e["eval_accuracy"] for e in last[0]] == [e["eval_accuracy"] for e in last[1]]
