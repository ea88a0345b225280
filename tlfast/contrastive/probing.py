"""How good image features are: a linear probe on all training images, and on a few of each class."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data import InputError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SHOTS = (1, 2, 4, 8, 16)
_ITERATIONS = 1000
_FEW_SHOT_STRENGTH = 1.0


def linear_probe(
    train: torch.Tensor,
    train_labels: Sequence[int],
    dev: torch.Tensor,
    dev_labels: Sequence[int],
    test: torch.Tensor,
    test_labels: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, Any]:
    """scikit-learn's logistic regression on features (N, D): {"accuracy", "C", "dev", "n"}; dev chooses C.

    Features are scaled to length sqrt(D), so that C means the same for all models. "dev": the accuracy of each C, of
    equally good ones the smallest is taken. "n": training images.
    Raises InputError for fewer than two classes, ValueError for shapes that do not fit or features that are not finite.
    """
    parts = {"train": (train, train_labels), "dev": (dev, dev_labels), "test": (test, test_labels)}
    _check(parts)
    fitted = {strength: _fit(train, train_labels, strength) for strength in strengths}
    scores = {strength: _accuracy(model, dev, dev_labels) for strength, model in fitted.items()}
    best = min(scores, key=lambda strength: (-scores[strength], strength))
    return {
        "accuracy": _accuracy(fitted[best], test, test_labels),
        "C": best,
        "dev": {f"{strength:g}": score for strength, score in scores.items()},
        "n": len(train),
    }


def few_shot(
    train: torch.Tensor,
    train_labels: Sequence[int],
    test: torch.Tensor,
    test_labels: Sequence[int],
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
) -> list[dict[str, Any]]:
    """A probe on so many images of each class, drawn by each seed: {"shots", "accuracy" (mean), "std", "accuracies"}.

    Features as of `linear_probe`; C is 1, since a few shots leave nothing to choose it by. A number of shots that a
    class does not have gives {"shots", "missing": how many it has}.
    Raises as `linear_probe`, and ValueError for a number of shots or seeds below 1.
    """
    _check({"train": (train, train_labels), "test": (test, test_labels)})
    if seeds < 1 or not shots or min(shots) < 1:
        raise ValueError(f"shots, seeds: {list(shots)} and {seeds}; must be at least 1 each")
    labels = np.asarray(train_labels)
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    fewest = min(map(len, places))
    rows: list[dict[str, Any]] = []
    for count in shots:
        if count > fewest:
            rows.append({"shots": count, "missing": fewest})
            continue
        accuracies = []
        for seed in range(seeds):
            draw = np.random.default_rng([seed, count])
            chosen = np.concatenate([draw.choice(place, count, replace=False) for place in places])
            model = _fit(train[torch.from_numpy(chosen)], labels[chosen], _FEW_SHOT_STRENGTH)
            accuracies.append(_accuracy(model, test, test_labels))
        spread = statistics.stdev(accuracies) if seeds > 1 else None
        mean = statistics.fmean(accuracies)
        rows.append({"shots": count, "accuracy": mean, "std": spread, "accuracies": accuracies})
    return rows


def _check(parts: dict[str, tuple[torch.Tensor, Sequence[int]]]) -> None:
    width = next(iter(parts.values()))[0].shape[-1]
    for name, (features, labels) in parts.items():
        if features.ndim != 2 or features.shape != (len(labels), width) or not len(labels):
            raise ValueError(
                f"{name}: features {tuple(features.shape)} for {len(labels)} labels; must be (N, {width}), N at least 1"
            )
        if not features.isfinite().all():
            raise ValueError(f"{name}: features have NaN or infinity; mend the model or its images")
    if len(set(parts["train"][1])) < 2:
        raise InputError("training data: there is only one class; a probe needs at least two")


def _scaled(features: torch.Tensor) -> np.ndarray:
    return (F.normalize(features.float(), dim=1) * features.shape[1] ** 0.5).numpy()


def _fit(features: torch.Tensor, labels: Sequence[int] | np.ndarray, strength: float) -> Any:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise InputError('a probe needs scikit-learn, which is not installed; run pip install -e ".[demo]"') from None
    with warnings.catch_warnings():  # after a thousand iterations the weights hardly move any more
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=_ITERATIONS).fit(_scaled(features), np.asarray(labels))


def _accuracy(model: Any, features: torch.Tensor, labels: Sequence[int]) -> float:
    return float((model.predict(_scaled(features)) == np.asarray(labels)).mean())
