"""The loop that trains every method of the transfer benchmarks, on a problem whose answer is known."""

from itertools import chain

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.loop import accuracy, mean_loss, shuffled_batches, train, tune

ROWS, WIDTH = 20, 6


class Linear(nn.Module):
    """The sign of the first input, to be found."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.fixture
def data():
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return {"x": x, "labels": (x[:, 0] > 0).long()}


def test_batches_hold_every_row_once_an_epoch_in_a_new_order(data):
    data["row"] = torch.arange(ROWS)
    rows = [batch["row"].tolist() for batch in shuffled_batches(data, size=5, steps=8)]
    assert [len(row) for row in rows] == [5] * 8
    first, second = [*chain(*rows[:4])], [*chain(*rows[4:])]
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second
    assert rows == [batch["row"].tolist() for batch in shuffled_batches(data, size=5, steps=8)]
    assert rows != [batch["row"].tolist() for batch in shuffled_batches(data, size=5, steps=8, seed=1)]
    for batch in shuffled_batches(data, size=5, steps=8):
        assert torch.equal(batch["x"], data["x"][batch["row"]])


def test_training_changes_what_requires_grad_and_nothing_else(data):
    torch.manual_seed(0)
    model = Linear()
    model.layer.bias.requires_grad_(False)
    bias, before = model.layer.bias.clone(), mean_loss(model, data)
    seconds = train(model, shuffled_batches(data, 10, 60), 60, 0.1)
    assert seconds > 0
    assert torch.equal(model.layer.bias, bias)
    assert mean_loss(model, data) < before / 2
    assert accuracy(model, data) == 1.0
    assert not model.training


def test_rows_weigh_the_same_whatever_the_batches(data):
    model = Linear().eval()
    whole = mean_loss(model, data, size=ROWS)
    assert mean_loss(model, data, size=7) == pytest.approx(whole, rel=1e-6)
    right = (model(data["x"]).logits.argmax(-1) == data["labels"]).sum().item()
    assert accuracy(model, data, size=7) == pytest.approx(right / ROWS)


def test_dev_chooses_the_rate_and_all_rates_start_alike():
    starts = []

    def make():
        model = Linear()
        starts.append(model.layer.weight.clone())
        return model

    def fit(model, rate):
        model.rate = rate
        return 10 * rate

    tuned = tune(make, (0.1, 0.2, 0.3), fit, lambda model: {0.1: 1.0, 0.2: 2.0, 0.3: 2.0}[model.rate])
    assert (tuned.rate, tuned.score, tuned.step_seconds, tuned.model.rate) == (0.2, 2.0, 2.0, 0.2)
    assert tuned.scores == {0.1: 1.0, 0.2: 2.0, 0.3: 2.0}
    assert all(torch.equal(start, starts[0]) for start in starts)
