"""The interface all dictionaries share, and several dictionaries as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..data.errors import InputError
from .sense import KINDS, Match, Sense


class Dictionary(ABC):
    """Names and their senses. name: what senses and tables call it."""

    name: str

    @abstractmethod
    def find(self, name: str, back_off: bool = True) -> Match:
        """The senses of a name and how they were found. back_off: whether to the head noun, where the name is missing.

        Raises InputError for an empty name.
        """

    def lookup(self, name: str, back_off: bool = True) -> list[Sense]:
        """The senses of a name, the best first; [] where there is none. Arguments and errors: as `find`."""
        return list(self.find(name, back_off).senses)


class Dictionaries(Dictionary):
    """Several dictionaries as one: the closest match counts, and among equally close ones the first dictionary's."""

    def __init__(self, dictionaries: Sequence[Dictionary]) -> None:
        if not dictionaries:
            raise InputError("dictionaries: there is none; pass at least one")
        self.dictionaries = tuple(dictionaries)
        self.name = ", ".join(dictionary.name for dictionary in dictionaries)

    def find(self, name: str, back_off: bool = True) -> Match:
        """As every dictionary. "exact" and "underscored" are equally close."""
        matches = [dictionary.find(name, back_off) for dictionary in self.dictionaries]
        return min(matches, key=lambda match: max(1, KINDS.index(match.kind)))
