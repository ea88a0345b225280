"""The picture of a blend: accuracy over the weight of knowledge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_DEV, _TEST = "#7a8794", "#1f6f8b"
_NORMAL_95 = 1.96


def draw_blend(
    path: Path, dev: Mapping[float, float], test: Mapping[float, float], chosen: float, examples: int, title: str
) -> None:
    """Draw accuracies by weight (0: names alone, 1: knowledge alone) on dev and test, as a PNG.

    dev, test: weight -> accuracy in [0, 1]. chosen: the weight that is marked. examples: test's, for its 95 % interval.
    """
    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    weights, accuracies = list(test), [100 * accuracy for accuracy in test.values()]
    margins = [_NORMAL_95 * 100 * math.sqrt(accuracy * (1 - accuracy) / examples) for accuracy in test.values()]
    axes.plot(list(dev), [100 * accuracy for accuracy in dev.values()], color=_DEV, marker="o", label="dev")
    axes.plot(weights, accuracies, color=_TEST, marker="o", linewidth=2, label="test, with 95 % interval")
    low, high = ([a + sign * m for a, m in zip(accuracies, margins, strict=True)] for sign in (-1, 1))
    axes.fill_between(weights, low, high, color=_TEST, alpha=0.15, linewidth=0)
    axes.axvline(chosen, color=_DEV, linestyle=":", label=f"chosen on dev: {chosen:g}")
    axes.set_xlabel("weight of knowledge (0: class names alone)")
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, format="png")
