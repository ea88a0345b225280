"""Wiktionary from a wiktextract dump (kaikki.org), through an index on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.errors import InputError
from .dump import Dump
from .inflection import base_forms
from .lexicon import Lexicon
from .names import collapse, fold
from .sense import Sense
from .wiktionary_index import Progress, build, check_settings, connect, read_meta

_MOST_LINKS = 3  # from a form to its word: "geese" -> "goose", alternative spelling of another
_INDEX_SUFFIX = ".sqlite"


class Wiktionary(Lexicon):
    """Wiktionary's definitions of one language.

    dump: wiktextract's JSONL, one object for each word and part of speech (.jsonl or .jsonl.gz), which is indexed at
    the first use; or the index itself (.sqlite). index: its place; None: beside the dump, its name with .sqlite added.
    language: a lang_code. rebuild: make the index anew. progress: called with the bytes indexed so far.

    A word that is only a form or another spelling of others (form_of, alt_of, plurals in `forms`) has their senses.
    Senses tagged obsolete, archaic or slang are left out. The index is far smaller than the dump, and needs neither it
    nor memory to speak of once it is made; an interrupted run goes on when it is called again.
    Raises InputError for a missing, damaged or changed dump, and malformed lines with their numbers.
    """

    name = "Wiktionary"

    def __init__(
        self,
        dump: str | Path,
        index: str | Path | None = None,
        language: str = "en",
        rebuild: bool = False,
        progress: Progress | None = None,
    ) -> None:
        path = Path(dump).expanduser()
        if path.suffix == _INDEX_SUFFIX:
            if not path.is_file():
                raise InputError(f"{path}: there is no such index; pass the dump it is to be made of")
            self.index = path
        else:
            self.index = Path(index).expanduser() if index else path.with_name(path.name + _INDEX_SUFFIX)
            _bring_up(path, self.index, language, rebuild, progress)
        self._language = language
        self._database = connect(self.index, read_only=True)
        meta = read_meta(self._database)
        check_settings(meta, self.index, language)
        if not meta["dump"]:
            raise InputError(f"{self.index}: is unfinished; pass the dump it is made of to go on")

    def __reduce__(self) -> Any:
        return Wiktionary, (self.index, None, self._language)

    def _written(self, form: str, pos: str) -> list[Sense]:
        return self._senses(form, pos, respelled=False)

    def _respelled(self, form: str, pos: str) -> list[Sense]:
        return self._senses(form, pos, respelled=True)

    def _bases(self, form: str, pos: str) -> Iterable[str]:
        """The words that this is a form of, and theirs; where none is known, what the rules give."""
        found: dict[str, None] = {}
        reached = [form]
        for _ in range(_MOST_LINKS):
            reached = [target for word in reached for target in self._targets(word, pos) if target not in found]
            found |= dict.fromkeys(reached)
        return found or base_forms(form, pos)

    def _targets(self, form: str, pos: str) -> list[str]:
        query = "SELECT target FROM sense WHERE key = ? AND pos = ? AND target IS NOT NULL ORDER BY rowid"
        return [fold(target) for (target,) in self._database.execute(query, (collapse(form), pos))]

    def _senses(self, form: str, pos: str, respelled: bool) -> list[Sense]:
        """Nouns, then names, verbs, adjectives, adverbs; each in Wiktionary's order."""
        query = (
            "SELECT word, definition, pos, proper FROM sense WHERE key = ? AND definition IS NOT NULL ORDER BY rowid"
        )
        rows = [row for row in self._database.execute(query, (collapse(form),)) if row[2] in pos]
        if not respelled:
            rows = [row for row in rows if fold(row[0]) == form]
        rows.sort(key=lambda row: (pos.index(row[2]), row[3]))
        return [Sense(word, definition, part, source=self.name) for word, definition, part, _ in rows]


def _bring_up(path: Path, index: Path, language: str, rebuild: bool, progress: Progress | None) -> None:
    """Make the index or go on with it, unless it is whole and of this very dump."""
    if rebuild:
        with Dump(path):  # an index whose dump is gone could not be made again
            pass
        index.unlink(missing_ok=True)
    if index.exists():
        database = connect(index)
        meta = read_meta(database)
        database.close()
        if meta.get("dump"):
            check_settings(meta, path, language)
            with Dump(path) as dump:
                if meta["dump"] != dump.state():
                    raise InputError(f"{path}: has changed since {index} was made of it; rebuild the index")
            return
    build(path, index, language, progress)
