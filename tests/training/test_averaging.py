"""Averages of the weights: what they are, that dev judges them, that they are kept, and that resuming is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tlfast.training import InterruptedTraining, Settings, fit
from tlfast.training.averaging import AVERAGES, WeightAverages
from tlfast.training.folder import last_checkpoint

from .bag import SETTINGS, Bag, assert_same_fit, make_data, state

AVERAGED = replace(SETTINGS, average=0.9)
STEPS = 8  # of an epoch


class Watched(Bag):
    """Remembers its weights before each training step, and those of each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.judged = [], {}

    def forward(self, input_ids, attention_mask, labels=None):
        if self.training:
            self.trained.append(state(self))
        else:
            self.judged[self.steps] = state(self)
        return super().forward(input_ids, attention_mask, labels)


def test_dev_judges_the_averages_and_training_goes_on_from_the_weights(tmp_path):
    result = fit(Watched, make_data(), AVERAGED, tmp_path)
    model, plain = result.model, fit(Watched, make_data(), SETTINGS, tmp_path / "plain").model
    for step, (mine, other) in enumerate(zip(model.trained, plain.trained, strict=True)):
        assert all(torch.equal(mine[name], other[name]) for name in mine), f"averaging changed step {step}"
    average = {name: tensor.double() for name, tensor in model.trained[0].items()}
    for step, weights in enumerate(model.trained[1:], start=1):
        decay = min(0.9, (step - 1) / (step + 9))
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
        if step % STEPS == 0:
            for name, expected in average.items():
                seen = model.judged[step][name]
                allowed = 4 * step * torch.finfo(seen.dtype).eps * expected.abs().max()
                assert (seen - expected).abs().max() <= allowed, (step, name)
                assert (seen - weights[name]).abs().max() > 100 * allowed, "the average is not the last weight"


def test_the_kept_weights_are_the_averages_of_the_best_epoch(tmp_path):
    settings = Settings(epochs=4, batch_size=8, learning_rates=(0.5,), seed=0, average=0.9)
    result = fit(Watched, make_data(), settings, tmp_path)
    scores = [entry["eval_accuracy"] for entry in result.chosen.history if "eval_accuracy" in entry]
    assert min(scores) < max(scores), "every epoch is equally good: this test would not see a wrong choice"
    best = scores.index(max(scores)) + 1
    assert result.chosen.best_epoch == best < 4
    assert result.dev["accuracy"] == max(scores)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, result.model.judged[best * STEPS][name]), name


@pytest.mark.parametrize("stop_at", [1, 5, 8, 12, 16], ids=lambda step: f"step{step}")  # 8 and 16 end an epoch
def test_a_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(tmp_path, stop_at):
    data = make_data()
    whole = fit(Bag, data, AVERAGED, tmp_path / "whole")
    with pytest.raises(InterruptedTraining):
        fit(lambda: Bag(stop_at=stop_at), data, AVERAGED, tmp_path / "cut")
    assert (last_checkpoint(tmp_path / "cut") / AVERAGES).is_file()
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert_same_fit(whole, fit(Bag, data, AVERAGED, tmp_path / "moved", resume=True))


def test_the_parts_that_are_not_trained_have_no_average(tmp_path):
    model = Bag()
    model.embedding.requires_grad_(False)
    frozen, averages = model.embedding.weight, WeightAverages(model, 0.5)
    with torch.no_grad():
        model.head.weight.fill_(2.0)
    averages.update(100)
    averages.save(tmp_path)
    other = WeightAverages(model, 0.5)
    other.load(tmp_path)
    before = state(model)
    with other.in_place():
        assert torch.equal(model.embedding.weight, before["embedding.weight"])
        assert not torch.equal(model.head.weight, before["head.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.embedding.weight is frozen


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"average: got .*; pass None or a decay in \[0, 1\)"):
        Settings(average=decay)
