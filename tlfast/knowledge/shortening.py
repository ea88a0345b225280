"""Definitions that do not fit: cut at the end of a clause, or dealt out over several texts; never inside a word."""

from __future__ import annotations

import re
from collections.abc import Callable

# what ends a clause: punctuation before a blank, a dash between blanks, a parenthesis, or a word that begins another
_CLAUSE_END = re.compile(r"(?<=[;:,.!?])\s+|\s+(?=--|\()|(?<=\))\s+|\s+(?=(?:which|that|who|whose|when|where|while)\b)")
_TRAILING = " ,;:-("
# what cannot end a definition, as a parenthesis in the middle of a clause may leave it
_DANGLING = re.compile(
    r"(?:^|\s+)(?:an?|and|as|at|by|for|from|in|of|on|or|the|to|with|which|that|who|whose|when|where|while)"
    r"(?:\s+\([^()]*\))?$",
    re.IGNORECASE,
)
Fits = Callable[[str], bool]


def clauses(text: str) -> list[str]:
    """The clauses of a definition; joined by blanks they are the text."""
    return [part for part in _CLAUSE_END.split(text) if part]


def shorten(text: str, fits: Fits) -> str | None:
    """The longest beginning of a definition that ends with a clause and fits; None where not even the first does.

    An opened parenthesis is not left open.
    """
    if fits(text):
        return text
    parts = clauses(text)
    for count in range(len(parts) - 1, 0, -1):
        beginning = close(" ".join(parts[:count]))
        if beginning and beginning.count("(") == beginning.count(")") and fits(beginning):
            return beginning
    return None


def chunk(text: str, fits: Fits) -> list[str] | None:
    """The definition in as few pieces as fit, ends of clauses before ends of words; None where a word does not fit."""
    pieces: list[str] = []
    current = ""
    for clause in clauses(text):
        joined = f"{current} {clause}".strip()
        if fits(joined):
            current = joined
            continue
        if current:
            pieces.append(current)
            current = ""
        for word in clause.split():
            joined = f"{current} {word}".strip()
            if fits(joined):
                current = joined
            elif current and fits(word):
                pieces.append(current)
                current = word
            else:
                return None
    return [*pieces, current] if current else pieces


def close(text: str) -> str:
    """The text without punctuation and words at its end that announce more, such as "and (usually)"."""
    before = None
    while text != before:
        before, text = text, _DANGLING.sub("", text.rstrip(_TRAILING))
    return text
