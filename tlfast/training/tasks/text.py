"""Classes, numbers or sets of classes for texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from ...data import (
    Examples,
    Labels,
    LabelSets,
    PadBatch,
    TokenDataset,
    fit_label_sets,
    fit_labels,
    read_examples,
    split_dev,
)
from ...data.label_sets import SEPARATOR
from ..evaluation import predict_logits
from ..scores import ClassScoring, NumberScoring, Scoring, SetScoring
from .base import LabelledTask, Predictions

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Columns:
    """Names in the header of a data file."""

    text: str = "text"
    label: str = "label"
    pair: str = "text_pair"


@dataclass(frozen=True)
class TextTask(LabelledTask):
    """Labels of texts. pairs: whether the model reads two; None: where the training file has them."""

    name: ClassVar[str] = "sequence-classification"

    columns: Columns = Columns()
    pairs: bool | None = None
    multi_label: bool = False

    @classmethod
    def of(
        cls,
        max_length: int,
        backbone: str,
        text_column: str = "text",
        label_column: str = "label",
        pair_column: str | None = None,
        multi_label: bool = False,
    ) -> Self:
        """The task before it has seen data. pair_column: where it is named, it must be there."""
        columns = Columns(text_column, label_column, pair_column or "text_pair")
        pairs = True if pair_column else None
        return cls(max_length, backbone, columns=columns, pairs=pairs, multi_label=multi_label)

    @property
    def problem_type(self) -> str:
        """As transformers names it."""
        return self._problem.name

    def fitted(self, train: Examples) -> Self:
        """With the labels that the training data have."""
        labels = fit_label_sets(train) if self.multi_label else fit_labels(train)
        return replace(self, labels=labels, pairs=train.pairs is not None)

    def settings(self) -> dict[str, Any]:
        """The columns, and whether a row may have several labels."""
        return {"columns": asdict(self.columns)} | ({"multi_label": True} if self.multi_label else {})

    def read(self, path: str | Path, labelled: bool) -> Examples:
        """Read a file as the training file was read; without labels it need not have the column."""
        columns = self.columns
        label = columns.label if labelled else None
        return read_examples(path, columns.text, label, columns.pair, self.pairs, empty_labels=self.multi_label)

    def dataset(self, records: Examples, preprocessor: Any) -> TokenDataset:
        """Tokenise, with targets where the examples have labels."""
        targets = None if records.labels is None else self.known.encode(records)
        return TokenDataset.tokenise(records, preprocessor, self.max_length, targets)

    def split(self, train: Examples, seed: int) -> tuple[Examples, Examples]:
        """Stratified by label, where a row has one."""
        return super().split(train, seed) if self.multi_label else split_dev(train, seed)

    def collate(self, preprocessor: Any) -> PadBatch:
        """Pads token ids."""
        return PadBatch.of(preprocessor, self.max_length)

    def scoring(self, preprocessor: Any) -> Scoring:
        """By classes, numbers or sets."""
        return self._problem.scoring

    def predict(self, model: Any, path: str | Path, preprocessor: Any) -> Predictions:
        """`prediction` a row: the class with its probability; the number; or the classes, joined by "|", with theirs.

        The probability of a set is that of exactly these classes, taken as independent.
        """
        dataset = self.dataset(self.read(path, labelled=False), preprocessor)
        logits = predict_logits(model, dataset, self.collate(preprocessor))
        return Predictions(self._problem.rows(self.known.names, logits), dataset.truncated)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Self:
        """From task.json."""
        names, multi_label = tuple(saved["labels"]["names"]), saved.get("multi_label", False)
        labels = LabelSets(names) if multi_label else Labels(names)
        columns = Columns(**saved["columns"])
        return cls(saved["max_length"], saved["backbone"], labels, columns, saved["pairs"], multi_label)

    @property
    def _problem(self) -> _Problem:
        if isinstance(self.known, LabelSets):
            return _SETS
        return _NUMBERS if self.known.regression else _CLASSES


class _Problem(NamedTuple):
    """A kind of label: transformers' name, how it is scored, and rows of predictions from class names and logits."""

    name: str
    scoring: Scoring
    rows: Callable[[tuple[str, ...], np.ndarray], Rows]


def class_rows(names: tuple[str, ...], logits: np.ndarray) -> Rows:
    """The most probable class and its probability."""
    probabilities, classes = torch.from_numpy(logits).softmax(dim=-1).max(dim=-1)
    pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
    return [{"prediction": names[index], "probability": p} for index, p in pairs]


def _number_rows(_names: tuple[str, ...], logits: np.ndarray) -> Rows:
    return [{"prediction": value} for value in logits.reshape(-1).tolist()]


def _set_rows(names: tuple[str, ...], logits: np.ndarray) -> Rows:
    values = torch.from_numpy(logits)
    probabilities = values.abs().sigmoid().prod(dim=-1).tolist()
    chosen = [[name for name, value in zip(names, row, strict=True) if value > 0] for row in values.tolist()]
    return [{"prediction": SEPARATOR.join(row), "probability": p} for row, p in zip(chosen, probabilities, strict=True)]


_CLASSES = _Problem("single_label_classification", ClassScoring(), class_rows)
_NUMBERS = _Problem("regression", NumberScoring(), _number_rows)
_SETS = _Problem("multi_label_classification", SetScoring(), _set_rows)
