"""Questions with several answers, of which one is right: .tsv, .csv and .jsonl files, as rows and as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .batches import PadBatch
from .errors import InputError
from .read import Rows, check_columns, field, read_table
from .tokens import ColumnDataset

CHOICE = "choice_"  # of the columns choice_0, choice_1, ...
ANSWERS = "answers"  # the column of an encoded example that marks the tokens of its answers
_FEWEST = 2


@dataclass(frozen=True)
class Choices(Rows):
    """The rows of one file: questions, as many answers for each, which is right (or None) and line numbers, from 1."""

    path: Path
    texts: list[str]
    choices: list[tuple[str, ...]]
    labels: list[int] | None
    lines: list[int]

    def select(self, indices: Iterable[int]) -> Choices:
        """The rows at `indices`, in that order."""
        rows = list(indices)
        labels = None if self.labels is None else [self.labels[i] for i in rows]
        texts, choices = [self.texts[i] for i in rows], [self.choices[i] for i in rows]
        return Choices(self.path, texts, choices, labels, [self.lines[i] for i in rows])


def read_choices(path: str | Path, text_column: str = "text", label_column: str | None = "label") -> Choices:
    """Read a file with the columns choice_0, choice_1 and so on, and the number of the right one in the label column.

    label_column: None reads no labels. Raises InputError, with the line number where there is one, as `read_examples`
    does, for fewer than two choices, a choice that is empty, and a label that is not the number of one.
    """
    path = Path(path)
    columns, rows = read_table(path)
    numbered = {name for name in columns if name.startswith(CHOICE)}
    names = [f"{CHOICE}{i}" for i in range(max(_FEWEST, len(numbered)))]
    check_columns(path, columns, [text_column, *names, *([] if label_column is None else [label_column])])
    allowed = {str(i): i for i in range(len(names))}
    lines, texts, choices, labels = [], [], [], []
    for line, row in rows:
        lines.append(line)
        texts.append(field(path, line, row, text_column))
        choices.append(tuple(field(path, line, row, name) for name in names))
        if label_column is not None:
            label = field(path, line, row, label_column).strip()
            if label not in allowed:
                raise InputError(
                    f"{path}, line {line}: the {label_column} {label[:40]!r} is not the number of a choice; write 0 to "
                    f"{len(names) - 1}, as in the columns' names"
                )
            labels.append(allowed[label])
    if not lines:
        raise InputError(f"{path}: the file has a header and no rows; add data")
    return Choices(path, texts, choices, None if label_column is None else labels, lines)


class ChoiceDataset(ColumnDataset):
    """Tokenised questions with their answers: item i is a dict of lists of C lists, and `labels` where there are any.

    The column "answers" marks the tokens of the answer. cut: the examples whose question lost its end.
    """

    @staticmethod
    def _length(ids: list) -> int:
        return max(map(len, ids))

    @classmethod
    def tokenise(cls, examples: Choices, tokenizer: Any, max_length: int) -> ChoiceDataset:
        """Each answer behind its question, as the tokenizer joins two texts, with a space between them.

        What is too long loses the end of its question. Raises InputError where an answer alone is too long.
        """
        count = len(examples.choices[0])
        questions = [text for text in examples.texts for _ in range(count)]
        answers = [f" {choice}" for choices in examples.choices for choice in choices]
        rows = tokenizer(questions, answers, truncation=False, verbose=False)
        columns = {name: list(values) for name, values in rows.items()}
        columns[ANSWERS] = [_marks(rows.sequence_ids(i)) for i in range(len(answers))]
        long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
        for i in long:
            over = len(columns["input_ids"][i]) - max_length
            end = _end_of_question(rows.sequence_ids(i))
            if rows.sequence_ids(i).count(0) <= over:
                raise InputError(
                    f"{examples.where(i // count)}: an answer leaves no token of {max_length} for its question; "
                    "shorten it"
                )
            for values in columns.values():
                values[i] = values[i][: end - over] + values[i][end:]
        made: dict[str, list] = {n: [v[i : i + count] for i in range(0, len(v), count)] for n, v in columns.items()}
        if examples.labels is not None:
            made["labels"] = examples.labels
        return cls(made, sorted({i // count for i in long}))


@dataclass(frozen=True)
class PadChoices:
    """Collate items of a ChoiceDataset into int64 tensors (B, C, S), and labels (B,)."""

    pad: PadBatch

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in items[0] if name not in ("labels", ANSWERS)]
        count = len(items[0]["input_ids"])
        flat = [{name: item[name][c] for name in names} for item in items for c in range(count)]
        batch = {name: x.view(len(items), count, -1) for name, x in self.pad(flat).items()}
        marks = torch.zeros_like(batch["input_ids"])
        for b, item in enumerate(items):
            for c, values in enumerate(item[ANSWERS]):
                marks[b, c, : len(values)] = torch.tensor(values)
        batch[ANSWERS] = marks
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch


def _marks(sequence_ids: list[int | None]) -> list[int]:
    """1 at the tokens of the second text."""
    return [int(number == 1) for number in sequence_ids]


def _end_of_question(sequence_ids: list[int | None]) -> int:
    return len(sequence_ids) - sequence_ids[::-1].index(0)
