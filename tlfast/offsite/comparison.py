"""What offsite-tuning was worth: zero-shot, emulator, plug-in and full tuning on one test set, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..training.evaluation import Collate, LabelledDataset, keep
from ..training.scores import Scoring

_RESAMPLES, _LEVEL = 1000, 95.0
ZERO, EMULATOR, PLUGGED, FULL = "zero-shot", "emulator", "plug-in", "full tuning"


@dataclass(frozen=True)
class Comparison:
    """metric: what is compared. scores: of each model. intervals: 95 % of each. gaps: plug-in minus another, paired.

    A gap is (difference, low, high), of the metric as it is; better: 1 where larger values are better, else -1.
    """

    metric: str
    better: int
    scores: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    gaps: Mapping[str, tuple[float, float, float]]

    @property
    def promises(self) -> dict[str, bool | None]:
        """What the method promises: whether each part holds beyond chance; None where the interval contains 0.

        Of plug-in and full tuning: that no difference is seen.
        """
        found: dict[str, bool | None] = {}
        for name in (ZERO, EMULATOR):
            if name in self.gaps:
                _, low, high = (self.better * value for value in self.gaps[name])
                low, high = min(low, high), max(low, high)
                found[f"{name} < {PLUGGED}"] = True if low > 0 else False if high < 0 else None
        if FULL in self.gaps:
            _, low, high = self.gaps[FULL]
            found[f"{PLUGGED} ~ {FULL}"] = low <= 0 <= high
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "metric": self.metric,
            "scores": dict(self.scores),
            "intervals": {name: list(value) for name, value in self.intervals.items()},
            "plug-in minus": {name: list(value) for name, value in self.gaps.items()},
            "promises": self.promises,
        }


def compare(
    models: Mapping[str, nn.Module], dataset: LabelledDataset, collate: Collate, scoring: Scoring, seed: int = 0
) -> Comparison:
    """Score models on one test set; intervals by the bootstrap over its examples, the same examples for all models.

    models: by ZERO, EMULATOR, PLUGGED and FULL; those that there are. Source: Efron and Tibshirani, "An Introduction to
    the Bootstrap", 1993, chapter 13 (percentiles).
    """
    kept = {name: keep(model, dataset, collate, scoring) for name, model in models.items()}
    draw = np.random.default_rng(seed)
    drawn = [draw.integers(0, len(dataset), len(dataset)) for _ in range(_RESAMPLES)]
    labels, metric = list(dataset.labels), _metric(scoring)

    def score(name: str, indices: np.ndarray) -> float:
        found = scoring.score([kept[name][i] for i in indices], [labels[i] for i in indices])[metric]
        return float("nan") if found is None else float(found)

    scores = {name: score(name, np.arange(len(dataset))) for name in models}
    resampled = {name: np.array([score(name, indices) for indices in drawn]) for name in models}
    gaps = {
        name: (scores[PLUGGED] - scores[name], *_percentiles(resampled[PLUGGED] - resampled[name]))
        for name in models
        if name != PLUGGED
    }
    intervals = {name: _percentiles(values) for name, values in resampled.items()}
    return Comparison(metric, 1 if metric != "perplexity" and scoring.more_is_better else -1, scores, intervals, gaps)


def _metric(scoring: Scoring) -> str:
    """Perplexity of language models, for people; else what dev selects by."""
    return "perplexity" if scoring.metric == "loss" else scoring.metric


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return float(low), float(high)
