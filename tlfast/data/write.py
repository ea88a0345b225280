"""Rows of results as text, in the formats that the readers take."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from .errors import InputError

TABLES = (".tsv", ".csv", ".jsonl")


def format_rows(rows: list[dict[str, Any]], suffix: str) -> str:
    """Rows with the same keys as the text of a .tsv, .csv or .jsonl file.

    Raises InputError for a field that .tsv, which has no quoting, cannot hold.
    """
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    table = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    if suffix == ".csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        return text.getvalue()
    broken = next((field for line in table for field in line if "\t" in field or "\n" in field), None)
    if broken is not None:
        raise InputError(f"{broken!r} has a tab or a line end, which .tsv cannot hold; write .csv or .jsonl")
    return "".join("\t".join(line) + "\n" for line in table)


def check_suffix(path: Path, known: tuple[str, ...] = TABLES) -> str:
    """The path's extension in lower case; InputError where it is not a known one."""
    suffix = path.suffix.lower()
    if suffix not in known:
        raise InputError(f"{path}: the extension {path.suffix!r} is not known; use one of {', '.join(known)}")
    return suffix


def format_conll(sentences: list[dict[str, Any]]) -> str:
    """Sentences (`tokens` and `tags`, lists of equal length) as CoNLL text: token, tab, tag; blank lines between."""
    blocks = (zip(sentence["tokens"], sentence["tags"], strict=True) for sentence in sentences)
    return "\n".join("".join(f"{token}\t{tag}\n" for token, tag in block) for block in blocks)
