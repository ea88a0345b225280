"""The picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_LOSS, _DEV = "#7a8794", "#1f6f8b"


def draw_curve(path: Path, history: Sequence[dict[str, Any]], metric: str, best_epoch: int | None, title: str) -> None:
    """Draw the training loss (left) and dev's `metric` after each epoch (right) over epochs, as a PNG.

    history: transformers' log_history. best_epoch: the selected one, from 1, is marked.
    """
    losses = [(entry["epoch"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(entry["epoch"], entry[f"eval_{metric}"]) for entry in history if f"eval_{metric}" in entry]
    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    right = left.twinx()
    left.plot(*zip(*losses, strict=True), color=_LOSS, alpha=0.35, linewidth=1)
    left.plot(*zip(*_smooth(losses), strict=True), color=_LOSS, linewidth=2)
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color=_LOSS)
    left.set_ylim(bottom=0)
    left.set_xlim(0, 1.06 * max(epoch for epoch, _ in scores))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(axis="y", alpha=0.25)
    right.plot(*zip(*scores, strict=True), color=_DEV, linewidth=2, marker="o")
    right.set_ylabel(f"dev {metric}", color=_DEV)
    right.margins(y=0.25)
    for epoch, value in scores:
        if best_epoch == round(epoch):
            right.plot(epoch, value, marker="o", markersize=12, fillstyle="none", color=_DEV)
            right.annotate(f"{value:.4f}", (epoch, value), (0, 12), textcoords="offset points", ha="center", color=_DEV)
    for axes in (left, right):
        axes.spines["top"].set_visible(False)
    left.set_title(title, loc="left", fontsize=11, parse_math=False)  # names may have dollars in them
    figure.savefig(path, format="png")


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over about a twentieth of the points, so that the trend is seen through the batches' noise."""
    width = max(1, len(points) // 20)
    means = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - width) : i + width + 1]]
        means.append((x, sum(window) / len(window)))
    return means
