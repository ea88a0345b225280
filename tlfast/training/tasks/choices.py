"""The right one of several answers to a question."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...data import ChoiceDataset, Choices, PadBatch, PadChoices, read_choices
from ..evaluation import predict_logits
from ..scores import ClassScoring
from .base import ColumnsTask, Predictions
from .text import class_rows


@dataclass(frozen=True)
class ChoiceTask(ColumnsTask):
    """Multiple choice: the number of the right answer. The answers are the columns choice_0, choice_1 and so on."""

    name: ClassVar[str] = "multiple-choice"

    def settings(self) -> dict[str, Any]:
        """The columns."""
        return {"columns": {"text": self.text_column, "label": self.label_column}}

    def read(self, path: str | Path, labelled: bool) -> Choices:
        """Read a file of questions and answers; without labels it need not have their column."""
        return read_choices(path, self.text_column, self.label_column if labelled else None)

    def dataset(self, records: Choices, preprocessor: Any) -> ChoiceDataset:
        """Tokenise each answer behind its question."""
        return ChoiceDataset.tokenise(records, preprocessor, self.max_length)

    def collate(self, preprocessor: Any) -> PadChoices:
        """Pads token ids, on the right: an answer is scored by the tokens before it."""
        return PadChoices(PadBatch.of(preprocessor, self.max_length))

    def scoring(self, preprocessor: Any) -> ClassScoring:
        """By accuracy."""
        return ClassScoring()

    def predict(self, model: Any, path: str | Path, preprocessor: Any) -> Predictions:
        """`prediction` and `probability` a row: the number of the answer, and its share among them."""
        dataset = self.dataset(self.read(path, labelled=False), preprocessor)
        logits = predict_logits(model, dataset, self.collate(preprocessor))
        names = tuple(map(str, range(logits.shape[1])))
        return Predictions(class_rows(names, logits), dataset.truncated)
