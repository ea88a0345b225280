"""Class names as people write them: parentheses, several names at once, and spellings that differ in little."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

_PARENTHESES = re.compile(r"\(([^()]*)\)")
_COMMA_OR_SLASH = re.compile(r"\s*[,;/]\s*")
_OR = re.compile(r"\s+or\s+", re.IGNORECASE)
_NO_LETTERS = re.compile(r"[\W_]+")
_WORD = re.compile(r"[^\W_]+")
PREPOSITIONS = frozenset({"of", "with", "without", "in", "on", "for", "from", "at"})


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class name taken apart: "kite (bird of prey)" is text "kite" with the qualifier "bird of prey".

    alternatives: the names in "a / b", "a, b" or "a or b"; just the text where there is one.
    """

    text: str
    alternatives: tuple[str, ...]
    qualifiers: tuple[str, ...]


def take_apart(name: str) -> ClassName:
    """Take a name with single blanks apart."""
    if "(" in name:
        qualifiers = tuple(filter(None, map(str.strip, _PARENTHESES.findall(name))))
        text = " ".join(_PARENTHESES.sub(" ", name).split()) or name
    else:
        qualifiers, text = (), name
    return ClassName(text, tuple(_alternatives(text)), qualifiers)


def _alternatives(text: str) -> list[str]:
    parts = [part for part in _COMMA_OR_SLASH.split(text) if part]
    found = [alternative for part in parts for alternative in _split_or(part)]
    return list(dict.fromkeys(found)) or [text]


def _split_or(text: str) -> Iterator[str]:
    """The names in "a or b", the likeliest first.

    Where the last is longer than the one before, that one may stand for more: a "traffic or street sign" is no traffic.
    """
    parts = _OR.split(text)
    last = parts[-1].split()
    short = [part for part in parts[:-1] if len(part.split()) < len(last)]
    yield from (f"{part} {last[-1]}" for part in short)
    yield from (part for part in parts if part not in short)
    yield from short


def fold(text: str) -> str:
    """The text as dictionaries are searched: blanks for underscores, single blanks, no case."""
    return " ".join(text.replace("_", " ").split()).casefold()


def collapse(text: str) -> str:
    """Letters and digits alone, without case and accents: alike for spellings that differ in blanks, hyphens, points.

    A text that has none stays as it is, folded.
    """
    folded = fold(text)
    if not folded.isascii():
        folded = "".join(c for c in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(c))
    return _NO_LETTERS.sub("", folded) or folded


def content_words(text: str) -> set[str]:
    """The words of three letters and more, without case and without a plural's s."""
    words = (word.casefold() for word in _WORD.findall(text))
    return {word.removesuffix("s") if len(word) > 3 else word for word in words if len(word) > 2}
