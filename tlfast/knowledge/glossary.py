"""A user's own definitions: a file of names and what they mean."""

from __future__ import annotations

from pathlib import Path

from ..data.read import read_examples
from .lexicon import Lexicon
from .names import collapse, fold
from .sense import Sense


class Glossary(Lexicon):
    """Definitions from a .tsv, .csv or .jsonl file with the columns `name` and `definition`.

    Rows with the same name are its senses, in the file's order; all count as nouns.
    Raises InputError, with the line's number, for what `tlfast.data.read_examples` refuses.
    """

    def __init__(self, path: str | Path, name_column: str = "name", definition_column: str = "definition") -> None:
        rows = read_examples(path, name_column, definition_column, pairs=False)
        assert rows.labels is not None
        self.name = rows.path.stem
        self._by_key: dict[str, list[Sense]] = {}
        for name, definition in zip(rows.texts, rows.labels, strict=True):
            sense = Sense(" ".join(name.split()), " ".join(definition.split()), source=self.name)
            self._by_key.setdefault(collapse(name), []).append(sense)

    def __len__(self) -> int:
        """How many different names there are."""
        return len(self._by_key)

    def _written(self, form: str, pos: str) -> list[Sense]:
        return [sense for sense in self._respelled(form, pos) if fold(sense.lemma) == form]

    def _respelled(self, form: str, pos: str) -> list[Sense]:
        return list(self._by_key.get(collapse(form), ())) if "n" in pos else []
