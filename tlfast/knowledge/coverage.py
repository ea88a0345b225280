"""How many class names a dictionary knows, and how each was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..data.errors import InputError
from .dictionary import Dictionary
from .sense import KINDS, Match


@dataclass(frozen=True)
class Coverage:
    """The matches of class names, in their order."""

    matches: tuple[Match, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many names were found in each of the ways in KINDS, "none" included."""
        found = Counter(match.kind for match in self.matches)
        return {kind: found[kind] for kind in KINDS}

    @property
    def covered(self) -> int:
        """How many names have a sense."""
        return sum(match.covered for match in self.matches)

    @property
    def ambiguous(self) -> int:
        """How many names have several senses, of which one has to be chosen."""
        return sum(len(match.senses) > 1 for match in self.matches)

    @property
    def missing(self) -> list[str]:
        """Names without a sense."""
        return [match.name for match in self.matches if not match.covered]


def cover(dictionary: Dictionary, names: Iterable[str], back_off: bool = True) -> Coverage:
    """Look every name up. back_off: whether to head nouns.

    Raises InputError for an empty name, and where there are none.
    """
    matches = tuple(dictionary.find(name, back_off) for name in names)
    if not matches:
        raise InputError("names: there are none; pass at least one class name")
    return Coverage(matches)
