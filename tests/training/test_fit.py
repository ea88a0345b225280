"""Training around transformers.Trainer, on a model small enough to train in a second."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tlfast.data import InputError
from tlfast.training import (
    InterruptedTraining,
    Settings,
    calibration_batches,
    fit,
    predict_logits,
    results,
    typical_batch,
)
from tlfast.training.callbacks import StopRequest
from tlfast.training.folder import last_checkpoint

from .bag import SETTINGS, WORDS, Bag, assert_same_fit, make_data, make_dataset


def test_fit_learns_and_reports_what_it_did(tmp_path):
    data, lines = make_data(), []
    result = fit(Bag, data, SETTINGS, tmp_path, report=lines.append)
    assert result.dev["accuracy"] > 0.7  # the larger class has about half
    assert result.chosen.dev == result.dev["accuracy"]
    assert len(result.chosen.epoch_seconds) == 3
    assert all(seconds > 0 for seconds in result.chosen.epoch_seconds)
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


def test_the_bar_is_shown_only_when_asked_for(tmp_path, capfd):
    data = make_data()
    fit(Bag, data, Settings(epochs=1, batch_size=8), tmp_path / "a")
    quiet = capfd.readouterr()
    assert quiet.out == ""
    assert "step/s" not in quiet.err
    fit(Bag, data, Settings(epochs=1, batch_size=8), tmp_path / "b", progress=True)
    loud = capfd.readouterr()
    assert loud.out == ""
    assert "lr 0.001:" in loud.err
    assert "0/8" in loud.err


def test_the_kept_weights_are_those_of_the_best_epoch(tmp_path):
    result = fit(Bag, make_data(), Settings(epochs=4, batch_size=8, learning_rates=(0.5,), seed=0), tmp_path)
    scores = [entry["eval_accuracy"] for entry in result.chosen.history if "eval_accuracy" in entry]
    assert min(scores) < max(scores), "every epoch is equally good: this test would not see a wrong choice"
    assert result.chosen.best_epoch == scores.index(max(scores)) + 1
    assert result.dev["accuracy"] == max(scores)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    data = make_data()
    first = fit(Bag, data, SETTINGS, tmp_path / "a")
    torch.rand(17)  # the state of the global generator must not matter
    assert_same_fit(first, fit(Bag, data, SETTINGS, tmp_path / "b", resume=True))  # nothing there: from the beginning
    other = fit(Bag, data, Settings(epochs=3, batch_size=8, learning_rates=(0.1,), seed=2), tmp_path / "c")
    assert not torch.equal(first.model.head.weight, other.model.head.weight)


@pytest.mark.parametrize("stop_at", [1, 5, 8, 12, 16], ids=lambda step: f"step{step}")  # 8 and 16 end an epoch
def test_a_run_resumed_after_ctrl_c_equals_an_uninterrupted_one(tmp_path, stop_at):
    data = make_data()
    whole = fit(Bag, data, SETTINGS, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedTraining):
        fit(lambda: Bag(stop_at=stop_at), data, SETTINGS, tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_checkpoint(tmp_path / "cut").name == f"checkpoint-{stop_at}"
    (tmp_path / "cut").rename(tmp_path / "moved")  # a resumed run finds its best epoch where the folder is now
    torch.rand(5)
    resumed = fit(Bag, data, SETTINGS, tmp_path / "moved", resume=True)
    assert resumed.model.steps == 24 - stop_at
    assert_same_fit(whole, resumed)
    assert len(resumed.chosen.epoch_seconds) == 3
    assert min(resumed.chosen.epoch_seconds) > 0


def test_a_second_ctrl_c_interrupts_at_once():
    request = StopRequest()
    with request.listening():
        signal.raise_signal(signal.SIGTERM)
        assert request.set
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_leave_signals_alone(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(fit, Bag, make_data(), Settings(epochs=1, batch_size=8), tmp_path).result()
    assert result.chosen.best_epoch == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path):
    data = make_data()
    whole = fit(Bag, data, SETTINGS, tmp_path)
    last = last_checkpoint(tmp_path)
    assert last.name == "checkpoint-24"
    (last / "trainer_state.json").write_text('{"best')
    assert last_checkpoint(tmp_path) != last
    assert_same_fit(whole, fit(Bag, data, SETTINGS, tmp_path, resume=True))


def test_dev_chooses_among_learning_rates_and_all_are_reported(tmp_path):
    data = make_data()
    settings = Settings(epochs=2, batch_size=8, learning_rates=(1e-6, 0.1), seed=1)
    result = fit(Bag, data, settings, tmp_path)
    assert result.chosen.learning_rate == 0.1
    assert [trial.learning_rate for trial in result.trials] == [1e-6, 0.1]
    assert result.trials[0].dev < result.trials[1].dev
    alone = fit(Bag, data, Settings(epochs=2, batch_size=8, learning_rates=(0.1,), seed=1), tmp_path / "alone")
    assert_same_fit(alone, result)


def test_a_learning_rate_that_diverges_is_reported_and_not_chosen(tmp_path):
    data, lines = make_data(regression=True), []
    settings = Settings(epochs=2, batch_size=8, learning_rates=(1e30, 0.1), seed=1)
    result = fit(lambda: Bag(1), data, settings, tmp_path, report=lines.append)
    assert (result.trials[0].dev, result.chosen.learning_rate) == (None, 0.1)
    assert any("1e+30" in line and "NaN or infinite" in line for line in lines)
    with pytest.raises(InputError, match=r"NaN or infinite with learning rate 1e\+30; pass a lower one"):
        fit(lambda: Bag(1), data, Settings(epochs=2, batch_size=8, learning_rates=(1e30,)), tmp_path / "alone")


def test_regression_is_selected_by_the_smallest_error(tmp_path):
    data = make_data(regression=True)
    result = fit(lambda: Bag(1), data, SETTINGS, tmp_path)
    errors = [entry["eval_mse"] for entry in result.chosen.history if "eval_mse" in entry]
    assert result.chosen.best_epoch == errors.index(min(errors)) + 1
    assert result.dev["mse"] == pytest.approx(min(errors), rel=1e-6)
    assert result.dev["mse"] < np.var(data.dev.labels)


def test_results_name_every_figure_and_their_json_is_finite(tmp_path):
    data = make_data()
    result = fit(Bag, data, SETTINGS, tmp_path)
    metrics = json.loads(json.dumps(results(result, data, make_dataset(20, 2), SETTINGS), allow_nan=False))
    assert metrics["accuracy"] == metrics["test"]["accuracy"]
    assert metrics["examples"] == {"train": 60, "dev": 30, "test": 20}
    assert (metrics["train"]["n"], metrics["dev"]["n"], metrics["test"]["n"]) == (60, 30, 20)
    assert metrics["trained_parameters"] == WORDS * 16 + 16 * 2 + 2
    assert metrics["seconds_per_epoch"] == pytest.approx(sum(metrics["epoch_seconds"]) / 3)
    assert metrics["trials"] == [{"learning_rate": 0.1, "dev": metrics["dev"]["accuracy"]}]


def test_predicted_logits_are_in_the_order_of_the_data_and_free_of_dropout():
    data, model = make_data(), Bag()
    logits = predict_logits(model, data.dev, data.collate, batch_size=7)
    assert model.training  # left as it was
    model.eval()
    for i in range(len(data.dev)):
        batch = data.collate([data.dev[i]])
        alone = model(batch["input_ids"], batch["attention_mask"]).logits[0].detach().numpy()
        np.testing.assert_allclose(logits[i], alone, rtol=0, atol=8 * np.finfo(np.float32).eps)


def test_batches_for_calibration_and_measuring():
    data = make_data()
    batches = calibration_batches(data, seed=0, batch_size=16)
    assert sum(len(batch["input_ids"]) for batch in batches) == 60
    assert all(batch["labels"].shape == (len(batch["input_ids"]),) for batch in batches)
    assert torch.equal(batches[0]["input_ids"], calibration_batches(data, seed=0, batch_size=16)[0]["input_ids"])
    batch = typical_batch(data, 8)
    assert batch["labels"].shape == (8,)
    middle = sorted(data.train.lengths)[26:34]
    assert sorted(batch["attention_mask"].sum(1).tolist()) == middle
