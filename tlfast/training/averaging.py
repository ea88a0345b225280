"""Averages of a model's weights over the steps of its training, which serve in its stead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGES = "averages.safetensors"  # beside the weights in a checkpoint


class WeightAverages:
    """a <- q a + (1 - q) w after every step t = 1, 2, ..., q = min(decay, (t - 1) / (t + 9)), of each trained weight w.

    An average reaches back over about a tenth of the steps so far, in long runs over 1 / (1 - decay) steps, and never
    to the weights a model started with. decay: in [0, 1). The frozen rest of a model and its buffers have no average.
    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the ramp of the decay is
    that of TensorFlow's ExponentialMovingAverage, but that it begins at 0.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        contiguous = torch.contiguous_format  # safetensors writes no other
        self._averages = {name: p.detach().clone(memory_format=contiguous) for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        decay = min(self.decay, (step - 1) / (step + 9))
        averages, weights = list(self._averages.values()), [p.detach() for p in self._weights.values()]
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages are the model's weights for the time of a `with` block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            before = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(before)

    def save(self, checkpoint: Path) -> None:
        """Write them into the folder of a checkpoint."""
        save_file(self._averages, checkpoint / AVERAGES)

    def load(self, checkpoint: Path) -> None:
        """Read them from the folder of a checkpoint."""
        for name, kept in load_file(checkpoint / AVERAGES).items():
            self._averages[name].copy_(kept)

    @torch.no_grad()
    def become_weights(self) -> None:
        """Give the model the averages for good."""
        for name, weight in self._weights.items():
            weight.copy_(self._averages[name])


class AverageSteps(TrainerCallback):
    """Takes in the weights after every step."""

    def __init__(self, averages: WeightAverages) -> None:
        self.averages = averages

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.averages.update(state.global_step)
