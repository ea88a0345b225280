"""Reader for tagged words: CoNLL files, one word a line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .errors import InputError
from .lines import read_lines

_DOCUMENT_START = "-DOCSTART-"
_COMMENT = "# "


@dataclass(frozen=True)
class Sentences:
    """The sentences of one file: their words, the words' raw tags (or None), and the words' line numbers, from 1."""

    path: Path
    words: list[list[str]]
    tags: list[list[str]] | None
    lines: list[list[int]]
    unit: ClassVar[str] = "sentences"
    source: ClassVar[str] = "file"

    def __len__(self) -> int:
        return len(self.words)

    def select(self, indices: Iterable[int]) -> Sentences:
        """The sentences at `indices`, in that order."""
        chosen = list(indices)
        tags = None if self.tags is None else [self.tags[i] for i in chosen]
        return Sentences(self.path, [self.words[i] for i in chosen], tags, [self.lines[i] for i in chosen])


def read_conll(path: str | Path, token_column: int = 0, tag_column: int | None = -1) -> Sentences:
    """Read a UTF-8 file with one word a line, its columns separated by tabs or else by blanks.

    token_column, tag_column: from 0, negative from the end; tag_column=None reads no tags.
    A blank line ends a sentence, and so does a -DOCSTART- line, which is skipped; lines that begin with "# " before a
    sentence are comments. Every other line must have as many columns as the first.
    Raises InputError, with the line number where there is one, for a missing or empty file, bad UTF-8, a ragged line,
    a column that is not there or is empty.
    """
    path = Path(path)
    words: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    numbers: list[list[int]] = [[]]
    width = None
    for number, line in enumerate(read_lines(path, "one word a line and blank lines between sentences"), 1):
        fields = _columns(line)
        if not line.strip() or fields[0] == _DOCUMENT_START:
            if words[-1]:
                words.append([])
                tags.append([])
                numbers.append([])
            continue
        if line.startswith(_COMMENT) and not words[-1]:
            continue
        if width is None:
            width = len(fields)
            _check_columns(path, number, width, token_column, tag_column)
        if len(fields) != width:
            raise InputError(
                f"{path}, line {number}: {len(fields)} columns where the lines before have {width}; "
                "give every word the same columns"
            )
        words[-1].append(_field(path, number, fields, token_column))
        numbers[-1].append(number)
        if tag_column is not None:
            tags[-1].append(_field(path, number, fields, tag_column))
    kept = [i for i, sentence in enumerate(words) if sentence]
    if not kept:
        raise InputError(f"{path}: the file has no words; add sentences, one word a line")
    return Sentences(path, words, None if tag_column is None else tags, numbers).select(kept)


def _columns(line: str) -> list[str]:
    """By tabs where there is one, which leaves blanks in words alone; other white space is never a separator."""
    if "\t" in line:
        return [field.strip(" ") for field in line.split("\t")]
    return [field for field in line.split(" ") if field]


def _check_columns(path: Path, line: int, width: int, token_column: int, tag_column: int | None) -> None:
    for name, column in (("token", token_column), ("tag", tag_column)):
        if column is not None and not -width <= column < width:
            raise InputError(
                f"{path}, line {line}: there is no {name} column {column}; the line has {width}, counted from 0"
            )
    if tag_column is not None and token_column % width == tag_column % width:
        raise InputError(
            f"{path}, line {line}: column {token_column % width} of {width} would be both token and tag; "
            "add the missing column or name the right ones"
        )


def _field(path: Path, line: int, fields: list[str], column: int) -> str:
    if not fields[column]:
        raise InputError(f"{path}, line {line}: column {column} is empty; fill it or remove the line")
    return fields[column]
