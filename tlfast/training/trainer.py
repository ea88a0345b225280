"""Train a model with transformers.Trainer, select by dev, resume exactly."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from ..data import InputError, LengthBuckets
from . import processes
from .averaging import AverageSteps, WeightAverages
from .callbacks import (
    DivergedError,
    EpochClock,
    EpochReport,
    OrderOfEpoch,
    ProgressBar,
    StopOnDivergence,
    StopRequest,
    StopWhenAsked,
)
from .evaluation import Collate, LabelledDataset, evaluate
from .folder import last_checkpoint
from .scores import Scores, Scoring


class InterruptedTraining(Exception):
    """Training was asked to stop and left a checkpoint from which it goes on exactly."""


@dataclass(frozen=True)
class Settings:
    """How to train. learning_rates: several are all tried, and dev chooses. warmup: share of the steps.

    batch_size: of a step, in all processes together. average: None, or the decay, in [0, 1), of averages of the weights
    (see WeightAverages) that dev judges, and that are kept, in the weights' stead.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (1e-3,)
    weight_decay: float = 0.01
    warmup: float = 0.06
    seed: int = 0
    average: float | None = None

    def __post_init__(self) -> None:
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average: got {self.average!r}; pass None or a decay in [0, 1), such as 0.998")


@dataclass(frozen=True)
class TaskData:
    """Data of a task as the model reads them. collate: makes a batch of examples."""

    train: LabelledDataset
    dev: LabelledDataset
    collate: Collate
    scoring: Scoring


@dataclass(frozen=True)
class Trial:
    """One learning rate. history: transformers' log_history; empty where training diverged, as then is dev None.

    epoch_seconds: training without evaluation, one figure an epoch.
    """

    learning_rate: float
    dev: float | None
    best_epoch: int | None
    epoch_seconds: tuple[float, ...]
    history: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Fit:
    """The selected model, with the weights of its best epoch, the trial it came from, and all trials in order."""

    model: nn.Module
    chosen: Trial
    trials: tuple[Trial, ...]
    dev: Scores


def fit(
    make_model: Callable[[], nn.Module],
    data: TaskData,
    settings: Settings,
    checkpoints: Path,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Train one model a learning rate, by AdamW with warmup and linear decay; keep the best epoch by dev.

    make_model: builds the model; called after the seed is set. Its forward takes labels and returns loss and logits.
    checkpoints: folder for transformers' checkpoints; with several rates, one folder in it each.
    resume: go on from the last whole checkpoint there; final weights and metrics are those of an uninterrupted run.
    progress: show a bar. report: takes one line an epoch.
    Dev selects by the metric of data.scoring; of equals the earlier epoch and rate win.
    Under torchrun every process calls this, inside processes.together(); the first writes, and batches are shared.
    Raises InterruptedTraining after Ctrl-C, InputError where every learning rate diverged, or where the batch size is
    not a multiple of the processes.
    """
    if settings.batch_size % processes.count():
        raise InputError(
            f"batch size {settings.batch_size}: it is shared by {processes.count()} processes; pass a multiple of that"
        )
    best: tuple[nn.Module, Trial] | None = None
    trials: list[Trial] = []
    for rate in settings.learning_rates:
        folder = checkpoints if len(settings.learning_rates) == 1 else checkpoints / f"lr-{rate:g}"
        set_seed(settings.seed)
        model = make_model()
        try:
            trial = _run(model, data, settings, rate, folder, resume, progress, report)
        except DivergedError as error:
            report(f"lr {rate:g}  {error}")
            trials.append(Trial(rate, None, None, (), ()))
            continue
        trials.append(trial)
        if best is None or _better(trial, best[1], data.scoring):
            best = (model, trial)
    if best is None:
        rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
        raise InputError(f"the loss became NaN or infinite with learning rate {rates}; pass a lower one")
    model, chosen = best
    return Fit(model, chosen, tuple(trials), evaluate(model, data.dev, data.collate, data.scoring))


class _BucketTrainer(Trainer):
    """transformers.Trainer with an order that depends on seed and epoch alone, which exact resuming needs."""

    def __init__(self, order: LengthBuckets, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._order = order
        self.add_callback(OrderOfEpoch(order))

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        return self._order

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return sorted(range(len(eval_dataset)), key=lambda i: -eval_dataset.lengths[i])


class _AveragingTrainer(_BucketTrainer):
    """Judges and keeps averages of the weights; its checkpoints hold both, so that training goes on exactly."""

    def __init__(self, order: LengthBuckets, decay: float, **arguments: Any) -> None:
        super().__init__(order, **arguments)
        model: Any = self.model  # where it trains, by now
        self._averages = WeightAverages(model, decay)
        self.add_callback(AverageSteps(self._averages))

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        with self._averages.in_place():
            return super().evaluate(*arguments, **named)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._averages.save(Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._averages.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._averages.load(Path(str(self.state.best_model_checkpoint)))
        self._averages.become_weights()


def _run(
    model: nn.Module,
    data: TaskData,
    settings: Settings,
    rate: float,
    folder: Path,
    resume: bool,
    progress: bool,
    report: Callable[[str], None],
) -> Trial:
    request = StopRequest()
    callbacks: list[TrainerCallback] = [StopWhenAsked(request), EpochClock(), StopOnDivergence()]
    prefix = f"lr {rate:g}  " if len(settings.learning_rates) > 1 else ""
    callbacks.append(EpochReport(report, data.scoring.metric, prefix))
    bar = ProgressBar(f"lr {rate:g}")
    if progress:
        callbacks.append(bar)
    # of the batches of all processes together: each takes its share of what one process would see
    order = LengthBuckets(data.train.lengths, settings.batch_size, settings.seed)
    make: Callable[..., Trainer] = functools.partial(_BucketTrainer, order)
    if settings.average is not None:
        make = functools.partial(_AveragingTrainer, order, settings.average)
    trainer = make(
        model=model,
        args=_arguments(data, settings, rate, folder),
        train_dataset=data.train,
        eval_dataset=data.dev,
        data_collator=data.collate,
        compute_metrics=lambda outcome: _scores(data.scoring, outcome),
        callbacks=callbacks,
        preprocess_logits_for_metrics=lambda logits, labels: data.scoring.reduce(_first(logits), labels),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is not None and processes.is_first():
        _point_to_best(checkpoint)
    processes.wait()
    try:
        with request.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
    if request.set:
        raise InterruptedTraining
    return _trial(trainer, rate, settings.epochs)


def _arguments(data: TaskData, settings: Settings, rate: float, folder: Path) -> TrainingArguments:
    scoring = data.scoring
    epoch_steps = math.ceil(len(data.train) / settings.batch_size)
    steps = epoch_steps * settings.epochs
    return TrainingArguments(
        output_dir=str(folder.resolve()),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size // processes.count(),
        per_device_eval_batch_size=int(min(2 * settings.batch_size, scoring.largest_batch)),
        learning_rate=rate,
        weight_decay=settings.weight_decay,
        warmup_steps=round(settings.warmup * steps),
        lr_scheduler_type="linear",
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the last: 1 would delete the last once training has ended
        load_best_model_at_end=True,
        metric_for_best_model=scoring.metric,
        greater_is_better=scoring.more_is_better,
        logging_steps=max(1, min(steps // 100, epoch_steps)),  # at least once an epoch
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=processes.count() > 1 and not torch.cuda.is_available(),  # or each would train alone
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )


def _point_to_best(checkpoint: Path) -> None:
    """Let the checkpoint name its best sibling by where it is now: Trainer wrote the path of the time."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["best_model_checkpoint"]:
        here = str(checkpoint.resolve().parent / Path(state["best_model_checkpoint"]).name)
        if here != state["best_model_checkpoint"]:
            path.write_text(json.dumps({**state, "best_model_checkpoint": here}, indent=2) + "\n", encoding="utf-8")


def _trial(trainer: Trainer, rate: float, epochs: int) -> Trial:
    history = tuple(trainer.state.log_history)
    seconds = [0.0] * epochs
    for entry in history:
        if "train_seconds" in entry:
            seconds[int(entry["in_epoch"])] += entry["train_seconds"]
    steps_per_epoch = trainer.state.max_steps // epochs
    best_epoch = (trainer.state.best_global_step or 0) // steps_per_epoch
    return Trial(rate, trainer.state.best_metric, best_epoch, tuple(seconds), history)


def _scores(scoring: Scoring, outcome: Any) -> Scores:
    return scoring.score(outcome.predictions, outcome.label_ids)


def _first(logits: Any) -> torch.Tensor:
    """Models of others may give more than logits."""
    return logits[0] if isinstance(logits, tuple) else logits


def _better(a: Trial, b: Trial, scoring: Scoring) -> bool:
    assert a.dev is not None and b.dev is not None  # only diverged trials have none, and they are not compared
    return a.dev > b.dev if scoring.more_is_better else a.dev < b.dev
