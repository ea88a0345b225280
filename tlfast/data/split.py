"""A tenth of the training data for dev, where there is no dev file."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .errors import InputError
from .labels import fit_labels
from .read import Examples


class Records(Protocol):
    """What a reader returns. unit: what one record is called; source: what they were read from."""

    @property
    def path(self) -> Path: ...

    @property
    def unit(self) -> str: ...

    @property
    def source(self) -> str: ...

    def __len__(self) -> int: ...

    def select(self, indices: Iterable[int]) -> Any:
        """The records at `indices`, in that order."""


def split_dev(train: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split off a tenth for dev, stratified by label (for regression: by the target's size), the same for a seed.

    Every class keeps at least one row for training. Raises InputError where there are fewer than 10 rows.
    """
    check_enough(train)
    labels = fit_labels(train)
    return split_stratified(train, labels.encode(train), seed, classes=not labels.regression)


def split_stratified(train: Any, targets: Sequence[int | float], seed: int, classes: bool = True) -> tuple[Any, Any]:
    """`split_dev` for any records, by targets at hand. classes: whether the targets are classes."""
    check_enough(train)
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: targets[i])  # stable: shuffled within a class, so every tenth is a stratified draw
    first = {targets[i]: i for i in reversed(order)} if classes else {}
    dev = sorted(i for i in order[5::10] if first.get(targets[i]) != i)
    if not dev:
        raise InputError(f"{train.path}: nearly every row is the only one of its class; pass a dev {train.source}")
    return _parts(train, dev)


def split_random(train: Any, seed: int) -> tuple[Any, Any]:
    """Split off a tenth for dev, drawn by the seed; InputError where there are fewer than 10 records."""
    check_enough(train)
    return draw_tenth(train, seed)


def draw_tenth(train: Any, seed: int) -> tuple[Any, Any]:
    """The records, or whatever has a length and `select`, without a tenth of them, and that tenth."""
    return _parts(train, sorted(random.Random(seed).sample(range(len(train)), len(train) // 10)))


def check_enough(train: Records) -> None:
    """InputError where there are too few records to split."""
    if len(train) < 10:
        raise InputError(
            f"{train.path}: {len(train)} {train.unit} are too few to split a dev set off; pass a dev {train.source}"
        )


def _parts(train: Any, dev: list[int]) -> tuple[Any, Any]:
    held = set(dev)
    return train.select([i for i in range(len(train)) if i not in held]), train.select(dev)
