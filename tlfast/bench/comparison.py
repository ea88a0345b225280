"""Methods beside each other on one test set: what each reaches and what it costs, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from ..training import TaskData, predict_logits, typical_batch
from ..training.evaluation import LabelledDataset
from . import measure

Row = Mapping[str, Any]

COLUMNS = ("method", "test accuracy", "seconds", "saved bytes a sample", "trained parameters")
_NORMAL_95 = 1.96
_RESAMPLES = 10_000
_COLOURS = ("#7a8794", "#1f6f8b")


@dataclass(frozen=True)
class Method:
    """One method's result. row: name, accuracy, examples (of the test set), seconds, saved_bytes, trained_parameters.

    correct: (N,) bool, whether each test example was classified correctly. seconds: of training, selection by dev
    included. saved_bytes: net bytes a sample that a training forward leaves allocated. accuracy: in [0, 1].
    """

    row: Row
    correct: np.ndarray


def assess(
    name: str, model: nn.Module, data: TaskData, test: LabelledDataset, seconds: float, batch_size: int
) -> Method:
    """Score a trained classifier on the test set and measure a training forward of `batch_size` typical samples."""
    correct = predict_logits(model, test, data.collate).argmax(axis=1) == np.asarray(test.labels)
    device = next(model.parameters()).device
    batch = {key: tensor.to(device) for key, tensor in typical_batch(data, batch_size).items()}
    model.train()
    saved = measure.saved_bytes(lambda: model(**batch))
    model.eval()
    row = {
        "name": name,
        "accuracy": float(correct.mean()),
        "examples": len(correct),
        "seconds": seconds,
        "saved_bytes": round(saved / len(batch["labels"])),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return Method(row, correct)


def gain(method: Method, baseline: Method) -> dict[str, Any]:
    """How much more accurate a method is than a baseline, in [-1, 1], and the half-width of its 95 % interval.

    Paired: both answered the same examples, so only those where they differ carry the uncertainty.
    """
    difference = method.correct.astype(float) - baseline.correct.astype(float)
    return {
        "of": method.row["name"],
        "over": baseline.row["name"],
        "accuracy": float(difference.mean()),
        "margin_95": _NORMAL_95 * float(difference.std(ddof=1)) / math.sqrt(len(difference)),
        "examples": len(difference),
    }


def verdict(gain: Mapping[str, Any]) -> str:
    """What `gain` found, in one line."""
    points, margin = 100 * gain["accuracy"], 100 * gain["margin_95"]
    return (
        f"{gain['of']} minus {gain['over']}: {points:+.1f} points, 95 % interval {points - margin:+.1f} to "
        f"{points + margin:+.1f} (paired, {gain['examples']:,} test texts)"
    )


def difference(ours: np.ndarray, other: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How much more accurate one method is than another, in [-1, 1], with its 95 % interval by the paired bootstrap.

    ours, other: (seeds, N) bool, whether each test example was classified correctly in a run with each training seed.
    Seeds and examples are both drawn anew, each with the methods' answers together, so that the interval is of another
    training and another test set. Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    if ours.shape != other.shape or ours.ndim != 2 or 0 in ours.shape:
        raise ValueError(f"ours, other: have shapes {ours.shape} and {other.shape}; pass two of (seeds, N), not empty")
    gap = ours.astype(np.float64) - other
    draw = np.random.default_rng(seed)
    weights = [draw.multinomial(count, np.full(count, 1 / count), _RESAMPLES) / count for count in gap.shape]
    low, high = np.percentile(np.einsum("bs,sn,bn->b", weights[0], gap, weights[1], optimize=True), (2.5, 97.5))
    return {"mean": float(gap.mean()), "low": float(low), "high": float(high), "resamples": _RESAMPLES}


def cells(row: Row) -> tuple[str, ...]:
    """A row's figures as text, in the order of COLUMNS."""
    return (
        row["name"],
        f"{100 * row['accuracy']:.1f} %",
        f"{row['seconds']:.0f}",
        in_bytes(row["saved_bytes"]),
        f"{row['trained_parameters']:,}",
    )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def console_table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title=title, title_justify="left", title_style="")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for row in rows:
        table.add_row(*cells(row))
    return table


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw accuracy (with 95 % intervals), seconds and saved memory as bars, one panel each, as a PNG."""
    figure = Figure(figsize=(9.0, 1.2 + 0.5 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    errors = [_NORMAL_95 * math.sqrt(r["accuracy"] * (1 - r["accuracy"]) / r["examples"]) * 100 for r in rows]
    texts = list(map(cells, rows))
    _bars(left, rows, [100 * row["accuracy"] for row in rows], [text[1] for text in texts], errors)
    _bars(middle, rows, [row["seconds"] for row in rows], [f"{text[2]} s" for text in texts])
    _bars(right, rows, [row["saved_bytes"] for row in rows], [text[3] for text in texts])
    left.set_xlim(0, 118)
    left.set_xticks((0, 25, 50, 75, 100))
    for axes, heading in (
        (left, "test accuracy, %"),
        (middle, "training time"),
        (right, "kept for backward, a sample"),
    ):
        axes.set_title(heading, fontsize=9, loc="left")
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (middle, right):
        axes.set_xticks(())
        axes.margins(x=0.45)
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, format="png")


def in_bytes(count: float) -> str:
    """A number of bytes in the unit that suits it, to three figures."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
    return f"{count:.0f} B"


def _bars(
    axes: Any, rows: Sequence[Row], values: list[float], texts: list[str], errors: list[float] | None = None
) -> None:
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(rows))]
    bars = axes.barh([row["name"] for row in rows], values, xerr=errors, color=colours, ecolor="#333333", height=0.6)
    axes.bar_label(bars, texts, padding=6, fontsize=9)
