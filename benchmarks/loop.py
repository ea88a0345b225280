"""One training loop for every method and for the pre-training before them: AdamW, warmup, linear decay."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

WARMUP, WEIGHT_DECAY, LARGEST_GRADIENT = 0.06, 0.01, 1.0
Columns = dict[str, torch.Tensor]  # model inputs and labels, as many rows each


@dataclass(frozen=True)
class Tuned:
    """A method at the rate that dev chose. score: on dev, higher is better; scores: of each rate."""

    model: Any
    rate: float
    score: float
    step_seconds: float
    scores: dict[float, float]


def shuffled_batches(data: Columns, size: int, steps: int, seed: int = 0) -> Iterator[Columns]:
    """`steps` batches of `size` rows, epoch after epoch, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(next(iter(data.values())))
    epochs = -(-steps * size // rows)
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])
    for chosen in order[: steps * size].view(steps, size):
        yield {name: column[chosen] for name, column in data.items()}


def train(model: Any, batches: Iterable[Columns], steps: int, rate: float, autocast: bool = False) -> float:
    """Train what requires grad on `steps` batches; the median of the steps' seconds.

    autocast: the forward in bfloat16, several times as fast on a CPU with AMX.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    model.train()
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    model.eval()
    return statistics.median(seconds)


def tune(
    make: Callable[[], nn.Module],
    rates: Sequence[float],
    fit: Callable[[nn.Module, float], float],
    score: Callable[[nn.Module], float],
    seed: int = 0,
) -> Tuned:
    """Train a model a rate, from the same seed, and keep the one with the highest score; of equals the first.

    fit: trains the model at the rate and returns the seconds a step. score: reads dev data only.
    """
    best: Tuned | None = None
    scores: dict[float, float] = {}
    for rate in rates:
        torch.manual_seed(seed)
        model = make()
        seconds = fit(model, rate)
        scores[rate] = score(model)
        if best is None or scores[rate] > best.score:
            best = Tuned(model, rate, scores[rate], seconds, scores)
    assert best is not None, "rates: the list is empty"
    return best


@torch.no_grad()
def mean_loss(model: Any, data: Columns, size: int = 32) -> float:
    """The mean loss over the rows, in eval mode; every row weighs the same."""
    total = 0.0
    rows = len(next(iter(data.values())))
    for start in range(0, rows, size):
        batch = {name: column[start : start + size] for name, column in data.items()}
        total += model(**batch).loss.item() * len(next(iter(batch.values())))
    return total / rows


@torch.no_grad()
def accuracy(model: Any, data: Columns, size: int = 256) -> float:
    """The share of rows whose largest logit is the label, in eval mode."""
    inputs = {name: column.split(size) for name, column in data.items() if name != "labels"}
    logits = [model(**dict(zip(inputs, parts, strict=True))).logits for parts in zip(*inputs.values(), strict=True)]
    return (torch.cat(logits).argmax(-1) == data["labels"]).float().mean().item()
