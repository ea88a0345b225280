"""Training around transformers.Trainer, on a model small enough to train in a second."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers.modeling_outputs import SequenceClassifierOutput

from tlfast.data import InputError, PadBatch, TokenDataset
from tlfast.training import (
    InterruptedTraining,
    RunFolder,
    Settings,
    TaskData,
    calibration_batches,
    fit,
    predict_logits,
    results,
    score,
    typical_batch,
    write_whole,
)
from tlfast.training.callbacks import StopRequest
from tlfast.training.folder import last_checkpoint, writing_to
from tlfast.training.scores import ClassScoring, NumberScoring

WORDS = 40
SETTINGS = Settings(epochs=3, batch_size=8, learning_rates=(0.1,), seed=1)


@pytest.fixture(autouse=True)
def one_thread():
    """The model is so small that waking a second thread takes longer than its work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert result.dev["mse"] < np.var(data.dev.columns["labels"])


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
    logits = predict_logits(model, data.dev, data.pad, batch_size=7)
    assert model.training  # left as it was
    model.eval()
    for i in range(len(data.dev)):
        batch = data.pad([data.dev[i]])
        alone = model(batch["input_ids"], batch["attention_mask"]).logits[0].detach().numpy()
        np.testing.assert_allclose(logits[i], alone, rtol=0, atol=8 * np.finfo(np.float32).eps)


def test_scores_agree_with_their_definitions():
    random = np.random.default_rng(0)
    logits, classes = random.normal(size=(50, 3)), random.integers(0, 3, 50)
    got = score(logits, classes, regression=False)
    assert got["accuracy"] == np.mean(logits.argmax(1) == classes)
    loss = nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(classes)).item()
    assert got["loss"] == pytest.approx(loss, rel=1e-12)
    predicted, wanted = random.normal(size=50), random.normal(size=50)
    got = score(predicted[:, None], wanted, regression=True)
    assert got["pearson"] == pytest.approx(np.corrcoef(predicted, wanted)[0, 1], rel=1e-12)
    assert got["mse"] == pytest.approx(np.mean((predicted - wanted) ** 2), rel=1e-12)
    assert score(np.ones((50, 1)), wanted, regression=True)["pearson"] is None


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


# the folder of a run


def test_a_run_claims_its_folder_and_gives_it_back_when_it_fails(tmp_path):
    run = RunFolder(tmp_path / "a" / "b")
    with pytest.raises(ZeroDivisionError), run.session({"x": 1}, resume=False):
        assert json.loads((run.path / "run.json").read_text()) == {"x": 1}
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_whole_checkpoints_and_removes_others(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.session({"x": 1}, resume=False):
        for name in ("checkpoint-1", "checkpoint-2", "lr-0.1/checkpoint-3"):
            (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / "checkpoint-1" / "trainer_state.json").write_text("{}")
        raise ZeroDivisionError
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["checkpoints/checkpoint-1/trainer_state.json", "run.json"]
    assert list(tmp_path.rglob("checkpoint-[23]")) == []
    with run.session({"x": 1}, resume=True):
        pass
    with pytest.raises(InputError, match="started with x=1, not 2"), run.session({"x": 2}, resume=True):
        pass
    with pytest.raises(InputError, match="already holds a run"), run.session({"x": 1}, resume=False):
        pass


def test_there_must_be_a_run_to_resume(tmp_path):
    run = RunFolder(tmp_path / "none")
    with pytest.raises(InputError, match="no run to resume"), run.session({}, resume=True):
        pass
    assert not run.path.exists()


def test_results_appear_together_or_not_at_all(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.publish() as folder:
        (folder / "model").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with run.publish() as folder:
        run.write_metrics(folder, {"accuracy": 1.0})
        (folder / "tokenizer").mkdir()
        assert not run.finished
    assert run.finished
    assert run.read_metrics() == {"accuracy": 1.0}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "tokenizer"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_disk_errors_become_one_line_and_others_pass(code, tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: .*, or pass another --out$"), writing_to(tmp_path):
        raise OSError(code, "no")
    with pytest.raises(OSError), writing_to(tmp_path):
        raise OSError(errno.EIO, "broken disk")
    with pytest.raises(RuntimeError, match="a bug"), writing_to(tmp_path):
        raise RuntimeError("a bug")


def test_a_file_is_written_whole_or_not(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.tsv", "x\n")
    assert (tmp_path / "a.tsv").read_text() == "x\n"

    def full(self, text, encoding):
        self.touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="no space left"):
        write_whole(tmp_path / "a.tsv", "y\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tsv"]
    assert (tmp_path / "a.tsv").read_text() == "x\n"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("room", [0, 8, 20, 28, 90, 120, 240])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tiny_disk, room):
    (tiny_disk / "filler").write_bytes(b"x" * 1024 * (252 - room))
    run = RunFolder(tiny_disk / "run")
    with pytest.raises(InputError, match="no space left"), run.session({"x": 1}, resume=False):
        big = Settings(epochs=4, batch_size=8, learning_rates=(0.1,))
        fit(Bag, make_data(), big, run.checkpoints)
        with run.publish() as folder:
            (folder / "model").write_bytes(b"x" * 400_000)
    assert run.has_checkpoint() == run.path.exists()
    assert not list(tiny_disk.rglob(".unfinished*"))
    assert all(last_checkpoint(path.parent) for path in tiny_disk.rglob("checkpoint-*"))
