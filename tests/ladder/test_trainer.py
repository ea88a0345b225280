"""transformers.Trainer takes a LadderModel as it is: lean checkpoints, exact resume, best model reloaded."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import tlfast
from tests.models import batch, tiny
from tlfast import LadderConfig, LadderModel


def examples(count=48):
    return [{k: v[0] for k, v in batch((6,), labels=2, seed=i).items()} for i in range(count)]


def trainer(folder, callbacks=(), ladder=None, **arguments):
    torch.manual_seed(0)
    model = LadderModel(tlfast.freeze(tiny()), config=LadderConfig(**{"reduction": 2} | (ladder or {})))
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
        **arguments,
    }
    data = examples()
    for row in data:
        row["labels"] = row["labels"].reshape(())
    return Trainer(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data, callbacks=[*callbacks])


class StopAfter(TrainerCallback):
    """Ends training right after a checkpoint, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def side_weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_checkpoints_hold_the_side_network_only(tmp_path):
    run = trainer(tmp_path, num_train_epochs=1)
    run.train()
    (path,) = tmp_path.glob("checkpoint-*/model.safetensors")
    assert set(load_file(path)) == set(run.model.state_dict())
    assert not any("backbone" in name for name in load_file(path))
    assert not list(tmp_path.glob("**/pytorch_model.bin"))


def test_resume_is_exact(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "cut", callbacks=[StopAfter(6)]).train()
    resumed = trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 18
    expected = side_weights(whole.model)
    for name, tensor in side_weights(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name


def test_evaluation_and_prediction_work(tmp_path):
    run = trainer(tmp_path, num_train_epochs=1)
    run.train()
    metrics = run.evaluate()
    assert np.isfinite(metrics["eval_loss"])
    assert run.predict(examples(5)).predictions.shape == (5, 2)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tmp_path, eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss", learning_rate=0.05
    )
    run.train()
    losses = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("storage", ["stream", "int8", "project"])
def test_every_tap_storage_trains_with_accumulation_and_resumes(storage, tmp_path):
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    ladder = {"tap_storage": storage, "tap_dim": 8, "dropout": 0.1}
    whole = trainer(tmp_path / "whole", ladder=ladder, **settings)
    whole.train()
    trainer(tmp_path / "cut", callbacks=[StopAfter(6)], ladder=ladder, **settings).train()
    resumed = trainer(tmp_path / "cut", ladder=ladder, **settings)
    resumed.train(resume_from_checkpoint=True)
    expected = side_weights(whole.model)
    for name, tensor in side_weights(resumed.model).items():
        assert torch.equal(tensor, expected[name]), name


def test_streaming_trains_as_keeping_does(tmp_path):
    losses = []
    for storage in ("keep", "stream"):
        run = trainer(tmp_path / storage, ladder={"tap_storage": storage, "dropout": 0.1}, num_train_epochs=1)
        run.train()
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
