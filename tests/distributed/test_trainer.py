"""transformers.Trainer in two processes: the steps of one process with the same global batches, and exact resuming."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.distributed import cases

BAR = 1e-5  # of losses and gradients' norms; what the two runs round otherwise
GLOBAL_BATCH, EPOCHS, BATCHES = 8, 2, 5


def examples(task):
    rows = [cases.batch(task, seed) for seed in range(BATCHES)]
    return [{name: value[i] for name, value in batch.items()} for batch in rows for i in range(cases.ROWS)]


class StopAfterSaving(TrainerCallback):
    """Ends training right after the first checkpoint, as an interruption would."""

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def trainer(task, folder, batch_size, accumulate=1, seed=0, init="prune"):
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    return Trainer(cases.ladder(task, seed, init=init), arguments, train_dataset=examples(task))


def curve(run):
    return [(entry["loss"], entry["grad_norm"]) for entry in run.state.log_history if "loss" in entry]


def train(rank, task, folder, accumulate, init):
    run = trainer(task, folder, GLOBAL_BATCH // 2 // accumulate, accumulate, rank, init)
    assert run.args.world_size == 2
    run.train()
    return curve(run)


@pytest.mark.parametrize(
    ("task", "accumulate", "init"),
    [
        *((task, 1, "prune") for task in cases.TASKS),
        # a ladder that calibrates itself does so on the first batch, of which there is less
        *((task, 2, "random") for task in ("sequence-classification", "causal-lm")),
    ],
)
def test_two_processes_take_the_steps_of_one(two_processes, tmp_path, task, accumulate, init):
    one = trainer(task, tmp_path / "one", GLOBAL_BATCH, init=init)
    one.train()
    for both in two_processes(train, task, tmp_path / "two", accumulate, init):
        assert len(both) == EPOCHS * BATCHES
        assert np.array(both) == pytest.approx(np.array(curve(one)), abs=BAR, rel=0)


def train_whole_and_resumed(rank, folder):
    task = "sequence-classification"
    whole, cut = (trainer(task, folder / name, GLOBAL_BATCH // 2) for name in ("whole", "cut"))
    whole.train()
    cut.add_callback(StopAfterSaving)
    cut.train()
    assert cut.state.global_step == BATCHES
    resumed = trainer(task, folder / "cut", GLOBAL_BATCH // 2, seed=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == EPOCHS * BATCHES
    return cases.side_weights(whole.model), cases.side_weights(resumed.model)


def test_resuming_in_two_processes_is_exact(two_processes, tmp_path):
    for whole, resumed in two_processes(train_whole_and_resumed, tmp_path):
        for name, weight in whole.items():
            assert np.array_equal(resumed[name], weight), name
    last = load_file(tmp_path / "cut" / f"checkpoint-{EPOCHS * BATCHES}" / "model.safetensors")
    assert set(last) == {*whole, "calibrated"}
    assert all(np.array_equal(last[name], weight) for name, weight in whole.items())
