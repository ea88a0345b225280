"""What every task has: from files to data, and from a trained model to predictions."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from ...data import TABLES, check_suffix, format_rows, split_random
from ..evaluation import Collate, LabelledDataset
from ..scores import Scoring

TASK = "task.json"


class Predictions(NamedTuple):
    """One dict an example, in the file's order, and how many examples lost a part to the model's greatest length."""

    rows: list[dict[str, Any]]
    cut: int


@dataclass(frozen=True)
class Task(ABC):
    """What is needed to read files for a model; saved beside a trained one as task.json.

    max_length: tokens an input may have, special ones included. backbone: name or folder. Labels and whatever else
    the training data decide are None until `fitted`. What `of` and `predict` take beyond the arguments here are the
    task's own options, by their names on the command line.
    """

    name: ClassVar[str]  # as LadderModel calls it
    model_class: ClassVar[str] = "AutoModel"  # of transformers, which loads the backbone
    preprocessor_class: ClassVar[str] = "AutoTokenizer"
    preprocessor_settings: ClassVar[Mapping[str, Any]] = {}
    preprocessor_folder: ClassVar[str] = "tokenizer"
    reads_folders: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = TABLES  # of files of predictions; the first is shown on a screen

    max_length: int
    backbone: str

    @classmethod
    @abstractmethod
    def of(cls, max_length: int, backbone: str) -> Self:
        """The task before it has seen data."""

    @property
    def num_labels(self) -> int | None:
        """The outputs of the head; None for language models."""
        return None

    @property
    def problem_type(self) -> str | None:
        """As transformers names it, where the task has several."""
        return None

    def fitted(self, train: Any) -> Self:
        """The task with what the training data decide; InputError where they cannot."""
        return self

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What of the task the user chose, as plain JSON types."""

    @abstractmethod
    def read(self, path: str | Path, labelled: bool) -> Any:
        """Read a file as the training file is read; without labels it need not have any. InputError as the reader."""

    @abstractmethod
    def dataset(self, records: Any, preprocessor: Any) -> LabelledDataset:
        """What the model reads of the records, with targets where they have labels."""

    def datasets(self, train: Any, dev: Any, preprocessor: Any, seed: int) -> tuple[LabelledDataset, LabelledDataset]:
        """The training and the dev data; where dev is None a tenth of train, drawn by the seed."""
        if dev is None:
            train, dev = self.split(train, seed)
        return self.dataset(train, preprocessor), self.dataset(dev, preprocessor)

    def split(self, train: Any, seed: int) -> tuple[Any, Any]:
        """Training records without a tenth, and that tenth."""
        return split_random(train, seed)

    @abstractmethod
    def collate(self, preprocessor: Any) -> Collate:
        """What makes a batch of examples."""

    @abstractmethod
    def scoring(self, preprocessor: Any) -> Scoring:
        """How the model is scored."""

    @abstractmethod
    def predict(self, model: Any, path: str | Path, preprocessor: Any) -> Predictions:
        """Predict for every record of a file, which needs no labels."""

    def format(self, rows: list[dict[str, Any]], suffix: str) -> str:
        """Predictions as the text of a file with that extension."""
        return format_rows(rows, suffix)

    def check_out(self, path: Path) -> str:
        """The extension of a file of predictions; InputError for one that the task does not write."""
        return check_suffix(path, self.suffixes)

    def save(self, folder: Path) -> None:
        """Write task.json."""
        content = {"task": self.name, **asdict(self)}
        (folder / TASK).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    @abstractmethod
    def from_saved(cls, saved: dict[str, Any]) -> Self:
        """The task that wrote this task.json; KeyError or TypeError where the content is not that of one."""


@dataclass(frozen=True)
class ColumnsTask(Task):
    """A task whose texts and labels are two columns of a table."""

    text_column: str = "text"
    label_column: str = "label"

    @classmethod
    def of(cls, max_length: int, backbone: str, text_column: str = "text", label_column: str = "label") -> Self:
        """The task before it has seen data."""
        return cls(max_length, backbone, text_column, label_column)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Self:
        """From task.json."""
        return cls(saved["max_length"], saved["backbone"], saved["text_column"], saved["label_column"])


@dataclass(frozen=True)
class LabelledTask(Task):
    """A task whose labels the training data decide. labels: Labels or LabelSets; None until then."""

    labels: Any = None

    @property
    def known(self) -> Any:
        """The labels of a fitted task."""
        assert self.labels is not None, "fitted() first"
        return self.labels

    @property
    def num_labels(self) -> int:
        """The number of logits."""
        return self.known.num_labels
