"""From raw labels to numbers: classes or a regression target, decided by the training data alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import InputError
from .images import Images
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

    def encode(self, examples: Examples | Images) -> list[int] | list[float]:
        """The labels of a file as class indices, or as floats for regression.

        Raises InputError, naming the line or image, for a class that is not in `names` or a number that is not finite.
        """
        labels = _raw(examples)
        if self.regression:
            return [_number(examples, i) for i in range(len(labels))]
        index = self.index
        encoded = []
        for i, label in enumerate(map(_class_name, labels)):
            if label not in index:
                raise InputError(f"{examples.where(i)}: {self.unknown(label)}")
            encoded.append(index[label])
        return encoded

    @property
    def index(self) -> dict[str, int]:
        """The place of each class."""
        return {name: i for i, name in enumerate(self.names)}

    def unknown(self, label: str, what: str = "label") -> str:
        """What an error says of a label that is not a class."""
        return (
            f"the {what} {label!r} is not in the training data, which has {_listing(self.names)}; "
            f"correct it or add examples of it to the training data"
        )


def fit_labels(train: Examples) -> Labels:
    """Decide from the training labels what the task is.

    Whole numbers or words are classes, sorted (numbers by value); numbers of which at least one has a fractional
    form, such as 2.5 or 3.0, are a regression target.
    Raises InputError where there is only one class or one target value, or a target is NaN or infinite.
    """
    raw = _raw(train)
    names = in_order(raw)
    regression = not all(map(_INTEGER.fullmatch, names)) and all(map(_is_number, raw))
    different = len({_number(train, i) for i in range(len(raw))}) if regression else len(names)
    if different < 2:
        raise InputError(f"{train.path}: every row has the label {raw[0]!r}; add rows with at least one other label")
    return Labels(() if regression else names)


def fit_classes(train: Images) -> Labels:
    """The folders' names as classes, sorted (whole numbers by value); InputError where there is only one."""
    names = in_order(_raw(train))
    if len(names) < 2:
        raise InputError(f"{train.path}: there is only the class {names[0]!r}; add a folder of at least one other")
    return Labels(names)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The different classes among labels: whole numbers by value, anything else as text."""
    names = set(map(_class_name, labels))
    return tuple(sorted(names, key=int) if all(map(_INTEGER.fullmatch, names)) else sorted(names))


def _raw(examples: Examples | Images) -> list[str]:
    if examples.labels is None:
        raise ValueError(f"{examples.path} was read without labels; read it with them")
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


def _number(examples: Examples | Images, index: int) -> float:
    label = _raw(examples)[index]
    if not _is_number(label):
        raise InputError(f"{examples.where(index)}: the label {label!r} is not a number; the training labels are")
    if not math.isfinite(float(label)):
        raise InputError(f"{examples.where(index)}: the label is {label}; give a finite number or remove the row")
    return float(label)


def _listing(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
