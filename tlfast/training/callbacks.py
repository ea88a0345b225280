"""What watches a transformers.Trainer: interruption, divergence, time, and the progress shown."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data import LengthBuckets
from . import processes


class DivergedError(ArithmeticError):
    """The loss became NaN or infinite. step: the optimizer step at which it was seen."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss became NaN or infinite by step {step}")
        self.step = step


class StopRequest:
    """Set by the first Ctrl-C (SIGINT) or SIGTERM; the second Ctrl-C interrupts at once, as usual."""

    def __init__(self) -> None:
        self.set = False

    def __call__(self, signum: int, _frame: Any) -> None:
        if self.set and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.set = True

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals for the time of a `with` block; only the main thread can, others leave them alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopWhenAsked(TrainerCallback):
    """On a stop request, save a checkpoint after the step under way and end training.

    In the middle of an epoch nothing is evaluated: a dev figure that an uninterrupted run would not have seen must not
    select the checkpoint.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.request.set = processes.any_of(self.request.set)  # all stop after the same step
        if self.request.set:
            control.should_training_stop = True
            control.should_save = not _at_epoch_end(args, state)  # there, the usual evaluation and checkpoint follow
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self.request.set and not _at_epoch_end(args, state):
            control.should_evaluate = control.should_save = False
        return control


class StopOnDivergence(TrainerCallback):
    """Raise DivergedError when a logged loss is not finite."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        losses = [value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")]
        if not all(map(math.isfinite, losses)):
            raise DivergedError(state.global_step)


class EpochClock(TrainerCallback):
    """Add the seconds of training, without evaluation, to the log: {"train_seconds", "in_epoch"}, epochs from 0.

    An epoch that was interrupted and resumed has two entries. Must come after StopWhenAsked.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._epoch = 0

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self._since, self._epoch = time.perf_counter(), state.global_step // _steps_per_epoch(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_training_stop or _at_epoch_end(args, state):
            self._stop(state)

    def _stop(self, state: TrainerState) -> None:
        if self._since is not None:
            seconds = time.perf_counter() - self._since
            state.log_history.append({"train_seconds": seconds, "in_epoch": self._epoch, "step": state.global_step})
            self._since = None


class OrderOfEpoch(TrainerCallback):
    """Tell the sampler which epoch it is: accelerate does not, where several processes resume in the middle of one."""

    def __init__(self, order: LengthBuckets) -> None:
        self.order = order

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.order.set_epoch(state.global_step // _steps_per_epoch(args, state))


class EpochReport(TrainerCallback):
    """Say in one line what each epoch gave on dev. prefix: tells runs apart."""

    def __init__(self, report: Callable[[str], None], metric: str, prefix: str = "") -> None:
        self.report = report
        self.prefix = prefix
        self.metric = metric

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        epoch = round(state.epoch or 0)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["epoch"] > epoch - 1]
        seconds = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.report(
            f"{self.prefix}epoch {epoch}/{round(args.num_train_epochs)}  train loss {sum(losses) / len(losses):.4f}  "
            f"dev {self.metric} {metrics[f'eval_{self.metric}']:.4f}  {seconds[-1]:.1f} s"
        )


class ProgressBar(TrainerCallback):
    """One bar over all steps, on standard error."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", leave=False, smoothing=0.1
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}", refresh=False)

    def close(self) -> None:
        """Take the bar off the screen, whether training ended or failed."""
        if self.bar is not None:
            self.bar.close()


def _steps_per_epoch(args: TrainingArguments, state: TrainerState) -> int:
    return max(1, state.max_steps // round(args.num_train_epochs))


def _at_epoch_end(args: TrainingArguments, state: TrainerState) -> bool:
    return state.global_step % _steps_per_epoch(args, state) == 0
