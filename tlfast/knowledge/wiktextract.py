"""One line of a wiktextract dump (kaikki.org), and the rows of the index that come of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..data.errors import InputError
from .names import collapse, fold

# wiktextract's parts of speech that name things or properties -> ours
POS = {"noun": "n", "name": "n", "verb": "v", "adj": "a", "adv": "r"}
SKIPPED_TAGS = frozenset({"obsolete", "archaic", "slang"})
_FORM_TAGS = frozenset({"plural", "alternative"})
_NO_FORM_TAGS = frozenset({"table-tags", "inflection-template", "class", *SKIPPED_TAGS})


class Row(NamedTuple):
    """A definition of a word, or, where there is none, the word it is a form of.

    key: `names.collapse` of the word, by which it is searched. proper: whether it is a name.
    """

    key: str
    word: str
    pos: str
    proper: bool
    definition: str | None
    target: str | None


def parse_line(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The line's object. Raises InputError with the line's number for what is not UTF-8, not JSON or not an object."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise InputError(f"{path}, line {number}: not UTF-8 ({at}); convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {number}: malformed JSON ({error.msg} at column {error.colno}); the file may be cut short: "
            "mend the line or download the file again"
        ) from None
    except RecursionError:
        raise InputError(f"{path}, line {number}: JSON that is nested too deep; remove the line") from None
    if not isinstance(entry, dict):
        raise InputError(f"{path}, line {number}: a JSON {type(entry).__name__}; wiktextract writes objects")
    return entry


def rows_of(entry: dict[str, Any], path: Path, number: int, language: str) -> Iterator[Row]:
    """The rows of an entry, its senses in their order; none where it is of another language or part of speech.

    Raises InputError where fields have other types than wiktextract's.
    """
    try:
        word, pos = entry.get("word", ""), POS.get(entry.get("pos", ""))
        if pos is None or not word.strip() or entry.get("lang_code") != language:
            return
        proper = entry["pos"] == "name"
        rows = [*_senses(entry, word, pos, proper), *_forms(entry, word, pos, proper)]
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"{path}, line {number}: not as wiktextract writes entries ({error}); index a dump of kaikki.org"
        ) from None
    yield from rows


def _senses(entry: dict[str, Any], word: str, pos: str, proper: bool) -> Iterator[Row]:
    """Definitions, and the words that this one is a form or another spelling of."""
    for sense in entry.get("senses", ()):
        if SKIPPED_TAGS.intersection(sense.get("tags", ())):
            continue
        targets = [link["word"] for link in (*sense.get("form_of", ()), *sense.get("alt_of", ())) if link.get("word")]
        if targets:
            yield from (Row(collapse(word), word, pos, proper, None, target) for target in targets)
        elif definition := _definition(sense):
            yield Row(collapse(word), word, pos, proper, definition, None)


def _definition(sense: dict[str, Any]) -> str:
    """The sense's gloss behind the glosses it is nested in, as one line."""
    glosses = sense.get("glosses") or sense.get("raw_glosses") or ()
    lines = (" ".join(gloss.split()) for gloss in glosses)
    return ": ".join(line.rstrip(":.; ") for line in lines if line.strip())


def _forms(entry: dict[str, Any], word: str, pos: str, proper: bool) -> Iterator[Row]:
    """Plurals and other spellings, which need not have entries of their own."""
    for form in entry.get("forms", ()):
        tags, written = set(form.get("tags", ())), form.get("form", "")
        if tags & _FORM_TAGS and not tags & _NO_FORM_TAGS and written.strip("- ") and fold(written) != fold(word):
            yield Row(collapse(written), written, pos, proper, None, word)
