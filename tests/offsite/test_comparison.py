"""Intervals and promises, on models whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tlfast.offsite.comparison import EMULATOR, FULL, PLUGGED, ZERO, compare
from tlfast.training.scores import ClassScoring


class Answers(nn.Module):
    """Right on a share of the examples, the same for equal seeds."""

    def __init__(self, share, seed=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.right = torch.from_numpy(np.random.default_rng(seed).random(400) < share)

    def forward(self, index, answer):
        given = torch.where(self.right[index], answer, 1 - answer)
        return SequenceClassifierOutput(logits=torch.nn.functional.one_hot(given, 2).float())


class Items:
    truncated = 0

    def __init__(self):
        self.lengths, self.labels = [1] * 400, [i % 2 for i in range(400)]

    def __len__(self):
        return 400

    def __getitem__(self, i):
        return {"index": i, "answer": i % 2, "labels": i % 2}


def stack(items):
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def test_scores_intervals_and_promises():
    models = {ZERO: Answers(0.5, 1), EMULATOR: Answers(0.9, 3), PLUGGED: Answers(0.8, 2), FULL: Answers(0.8, 2)}
    found = compare(models, Items(), stack, ClassScoring())
    for name, model in models.items():
        share = float(model.right.float().mean())
        low, high = found.intervals[name]
        error = (share * (1 - share) / 400) ** 0.5
        assert found.scores[name] == pytest.approx(share)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15) and low < share < high
    gap, low, high = found.gaps[ZERO]
    assert gap == pytest.approx(found.scores[PLUGGED] - found.scores[ZERO]) and low < gap < high
    assert found.gaps[FULL] == (0.0, 0.0, 0.0), "paired: the same answers differ nowhere"
    assert found.promises == {"zero-shot < plug-in": True, "emulator < plug-in": False, "plug-in ~ full tuning": True}


def test_what_is_not_seen_is_not_claimed():
    found = compare({EMULATOR: Answers(0.8, 4), PLUGGED: Answers(0.8, 5)}, Items(), stack, ClassScoring())
    assert found.promises == {"emulator < plug-in": None}
    assert compare({PLUGGED: Answers(1.0)}, Items(), stack, ClassScoring()).promises == {}
