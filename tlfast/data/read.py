"""Readers for text with labels: .tsv, .csv and .jsonl files, every complaint with its line number."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .errors import InputError
from .lines import read_lines
from .write import check_suffix

Row = tuple[int, dict[str, str]]

_CSV_FIELD_LIMIT = 1 << 30  # csv's own limit, 128 KiB, is shorter than many documents


class Rows:
    """What the rows of a file have in common, whatever their columns."""

    path: Path
    texts: list[str]
    lines: list[int]
    unit: ClassVar[str] = "rows"
    source: ClassVar[str] = "file"

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """What an error about a row begins with."""
        return f"{self.path}, line {self.lines[index]}"


@dataclass(frozen=True)
class Examples(Rows):
    """The rows of one file: texts, second texts of pairs (or None), raw labels (or None) and line numbers, from 1."""

    path: Path
    texts: list[str]
    pairs: list[str] | None
    labels: list[str] | None
    lines: list[int]

    def select(self, indices: Iterable[int]) -> Examples:
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        texts, lines = [self.texts[i] for i in chosen], [self.lines[i] for i in chosen]
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return Examples(self.path, texts, pairs, labels, lines)


def read_examples(
    path: str | Path,
    text_column: str = "text",
    label_column: str | None = "label",
    pair_column: str = "text_pair",
    pairs: bool | None = None,
    empty_labels: bool = False,
) -> Examples:
    """Read a UTF-8 file with a header (.tsv, .csv) or one JSON object a line (.jsonl).

    text_column, label_column: names in the header; label_column=None reads no labels.
    pair_column: the second text of sentence pairs. pairs: True: it must be there; False: it is not read; None: it is
        read where it exists.
    empty_labels: whether a label may be empty, as where a row may have any number of labels.
    In .tsv a quote is a character like any other; in .csv fields may be quoted as RFC 4180 says.
    Raises InputError, with the line number where there is one, for a missing or empty file, another extension, a
    missing column, a ragged row, bad UTF-8, malformed JSON, an empty text or label.
    """
    path = Path(path)
    columns, rows = read_table(path)
    if pairs is None:
        pairs = pair_column in columns
    wanted = [text_column, *([pair_column] if pairs else []), *([label_column] if label_column is not None else [])]
    check_columns(path, columns, wanted)
    lines, texts, seconds, labels = [], [], [], []
    for line, row in rows:
        lines.append(line)
        texts.append(field(path, line, row, text_column))
        if pairs:
            seconds.append(field(path, line, row, pair_column))
        if label_column is not None:
            labels.append((row.get(label_column, "") if empty_labels else field(path, line, row, label_column)).strip())
    if not lines:
        raise InputError(f"{path}: the file has a header and no rows; add data")
    return Examples(path, texts, seconds if pairs else None, labels if label_column is not None else None, lines)


def read_table(path: Path) -> tuple[list[str], Iterator[Row]]:
    """The columns of a .tsv, .csv or .jsonl file, and its rows with their line numbers; InputError as above."""
    return _READERS[check_suffix(path)](path, read_lines(path, "a header and rows"))


def _read_tsv(path: Path, lines: list[str]) -> tuple[list[str], Iterator[Row]]:
    header = lines[0].split("\t")
    numbered = ((number, line.split("\t")) for number, line in enumerate(lines[1:], 2))
    return header, _to_rows(path, header, numbered)


def _read_csv(path: Path, lines: list[str]) -> tuple[list[str], Iterator[Row]]:
    records = list(_csv_records(path, lines))
    header = records[0][1]
    return header, _to_rows(path, header, records[1:])


def _csv_records(path: Path, lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(first line number, fields) of each record; a quoted field may span lines."""
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    previous = csv.field_size_limit(_CSV_FIELD_LIMIT)
    start = 1
    try:
        for record in reader:
            yield start, record
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {start}: malformed CSV ({error}); close and double the quotes") from None
    finally:
        csv.field_size_limit(previous)


def _to_rows(path: Path, header: list[str], records: Iterable[tuple[int, list[str]]]) -> Iterator[Row]:
    for line, fields in records:
        if len(fields) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(fields)} fields where the header has {len(header)}; "
                "give every row the columns of the header"
            )
        yield line, dict(zip(header, fields, strict=True))


def _read_jsonl(path: Path, lines: list[str]) -> tuple[list[str], Iterator[Row]]:
    records = [(number, _parse_json(path, number, line)) for number, line in enumerate(lines, 1)]
    return list(records[0][1]), iter(records)


def _parse_json(path: Path, line: int, text: str) -> dict[str, str]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line}: malformed JSON ({error.msg} at column {error.colno}); write one object a line"
        ) from None
    if not isinstance(record, dict):
        raise InputError(f"{path}, line {line}: a JSON {type(record).__name__}; write one object a line")
    return {key: _as_text(value) for key, value in record.items()}


def _as_text(value: Any) -> str:
    """A JSON value as a field of a table would hold it; null is an empty field."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def check_columns(path: Path, columns: list[str], wanted: list[str]) -> None:
    """InputError for a column that is missing, or there twice."""
    for column in wanted:
        if column not in columns:
            present = ", ".join(map(repr, columns))
            raise InputError(
                f"{path}: there is no column {column!r}; it has {present}. Rename it or name the right one"
            )
        if columns.count(column) > 1:
            raise InputError(f"{path}: the column {column!r} is there {columns.count(column)} times; keep one")


def field(path: Path, line: int, row: dict[str, str], column: str) -> str:
    """The row's field, which must hold something; only .jsonl rows may lack it altogether."""
    if not row.get(column, "").strip():
        raise InputError(f"{path}, line {line}: the column {column!r} is empty; fill it or remove the row")
    return row[column]


_READERS = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl}
