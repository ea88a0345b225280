"""From raw labels to numbers: classes or a regression target, decided by the training data alone."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from .errors import InputError
from .read import Examples

_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Labels:
    """What the labels of a task mean. names: the classes in the order of the logits; empty for regression."""

    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Whether the target is a number instead of a class."""
        return not self.names

    @property
    def num_labels(self) -> int:
        """The number of logits: the classes, or 1 for regression."""
        return len(self.names) or 1

    def encode(self, examples: Examples) -> list[int] | list[float]:
        """The labels of a file as class indices, or as floats for regression.

        Raises InputError, naming the line, for a class that is not in `names` or a number that is not finite.
        """
        labels = _raw(examples)
        if self.regression:
            return [_number(examples, i) for i in range(len(labels))]
        index = {name: i for i, name in enumerate(self.names)}
        encoded = []
        for label, line in zip(map(_class_name, labels), examples.lines, strict=True):
            if label not in index:
                raise InputError(
                    f"{examples.path}, line {line}: the label {label!r} is not in the training data, which has "
                    f"{_listing(self.names)}; correct it or add examples of it to the training file"
                )
            encoded.append(index[label])
        return encoded


def fit_labels(train: Examples) -> Labels:
    """Decide from the training labels what the task is.

    Whole numbers or words are classes, sorted (numbers by value); numbers of which at least one has a fractional
    form, such as 2.5 or 3.0, are a regression target.
    Raises InputError where there is only one class or one target value, or a target is NaN or infinite.
    """
    raw = _raw(train)
    names = {_class_name(label) for label in raw}
    whole = all(_INTEGER.fullmatch(name) for name in names)
    regression = not whole and all(_is_number(label) for label in raw)
    if regression:
        different = len({_number(train, i) for i in range(len(raw))})
    else:
        different = len(names)
    if different < 2:
        raise InputError(f"{train.path}: every row has the label {raw[0]!r}; add rows with at least one other label")
    if regression:
        return Labels(())
    return Labels(tuple(sorted(names, key=int) if whole else sorted(names)))


def split_dev(train: Examples, seed: int) -> tuple[Examples, Examples]:
    """Split off a tenth for dev, stratified by label (for regression: by the target's size), the same for a seed.

    Every class keeps at least one row for training. Raises InputError where there are fewer than 10 rows.
    """
    if len(train) < 10:
        raise InputError(f"{train.path}: {len(train)} rows are too few to split a dev set off; pass a dev file")
    labels = fit_labels(train)
    targets = labels.encode(train)
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: targets[i])  # stable: shuffled within a class, so every tenth is a stratified draw
    first = {} if labels.regression else {targets[i]: i for i in reversed(order)}
    dev = sorted(i for i in order[5::10] if first.get(targets[i]) != i)
    if not dev:
        raise InputError(f"{train.path}: nearly every row is the only one of its class; pass a dev file")
    held = set(dev)
    return train.select(i for i in range(len(train)) if i not in held), train.select(dev)


def _raw(examples: Examples) -> list[str]:
    if examples.labels is None:
        raise ValueError(f"{examples.path} was read without labels; pass label_column to read_examples")
    return examples.labels


def _class_name(label: str) -> str:
    """Integers in their shortest form, so that 1, +1 and 01 are one class."""
    return str(int(label)) if _INTEGER.fullmatch(label) else label


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return "_" not in label  # float("1_0") is 10, but nobody means that in a file


def _number(examples: Examples, index: int) -> float:
    label, line = _raw(examples)[index], examples.lines[index]
    if not _is_number(label):
        raise InputError(f"{examples.path}, line {line}: the label {label!r} is not a number; the training labels are")
    if not math.isfinite(float(label)):
        raise InputError(f"{examples.path}, line {line}: the label is {label}; give a finite number or remove the row")
    return float(label)


def _listing(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
