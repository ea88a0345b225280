"""Several labels a row: sets of classes, decided by the training data alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .errors import InputError
from .labels import Labels, in_order
from .read import Examples

SEPARATOR = "|"


@dataclass(frozen=True)
class LabelSets:
    """What the labels of a multi-label task mean. names: the classes in the order of the logits."""

    names: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """The number of logits."""
        return len(self.names)

    def encode(self, examples: Examples) -> list[list[float]]:
        """The labels of a file, for each row 1.0 for the classes it has and 0.0 for the others.

        Raises InputError, naming the line, for a class that is not in `names` or a label that is not written as one.
        """
        classes = Labels(self.names)
        index, encoded = classes.index, []
        for i in range(len(examples)):
            row = [0.0] * len(self.names)
            for name in _names(examples, i):
                if name not in index:
                    raise InputError(f"{examples.where(i)}: {classes.unknown(name)}")
                row[index[name]] = 1.0
            encoded.append(row)
        return encoded


def fit_label_sets(train: Examples) -> LabelSets:
    """The classes that occur in the training labels; InputError where no row has any.

    A row's labels are separated by "|", or a list in .jsonl; an empty label means none of them.
    """
    names = in_order(name for i in range(len(train)) for name in _names(train, i))
    if not names:
        raise InputError(f"{train.path}: no row has a label; add rows that have some")
    return LabelSets(names)


def _names(examples: Examples, index: int) -> tuple[str, ...]:
    if examples.labels is None:
        raise ValueError(f"{examples.path} was read without labels; read it with them")
    label = examples.labels[index]
    if examples.path.suffix.lower() == ".jsonl" and label.startswith("["):
        parts = _from_list(examples, index, label)
    else:
        parts = [part.strip() for part in label.split(SEPARATOR)] if label else []
    if not all(parts):
        raise InputError(
            f"{examples.where(index)}: the label {label!r} has an empty part; write a{SEPARATOR}b, or nothing for none"
        )
    return in_order(parts)


def _from_list(examples: Examples, index: int, label: str) -> list[str]:
    try:  # the reader made it from a list, or it is a text that looks like one
        values = json.loads(label)
    except json.JSONDecodeError:
        values = [None]
    if not all(isinstance(value, str | int) for value in values):
        raise InputError(f'{examples.where(index)}: the label {label} is not a list of names; write one such as ["a"]')
    return [str(value).strip() for value in values]
