"""Reader for running text: a .txt file as one document, or the texts of a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .errors import InputError
from .lines import read_text
from .read import read_examples
from .write import TABLES, check_suffix


@dataclass(frozen=True)
class Documents:
    """The documents of one file, in its order."""

    path: Path
    texts: list[str]
    unit: ClassVar[str] = "documents"
    source: ClassVar[str] = "file"

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> Documents:
        """The documents at `indices`, in that order."""
        return Documents(self.path, [self.texts[i] for i in indices])


def read_documents(path: str | Path, text_column: str = "text") -> Documents:
    """Read a UTF-8 .txt file as one document, or a column of a .tsv, .csv or .jsonl file as one a row.

    Raises InputError as `read_examples` does, and for a .txt file without text.
    """
    path = Path(path)
    if check_suffix(path, (".txt", *TABLES)) != ".txt":
        return Documents(path, read_examples(path, text_column, label_column=None, pairs=False).texts)
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it needs text")
    return Documents(path, [text])
