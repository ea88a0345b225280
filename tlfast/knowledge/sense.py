"""What a dictionary says about a name: its senses, and how far the name had to be changed to find them."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("exact", "underscored", "lemma", "head noun", "none")


@dataclass(frozen=True, slots=True)
class Sense:
    """One meaning of a word.

    lemma: the word as the dictionary spells it, with blanks. definition: one line, without examples. pos: "n", "v", "a"
    or "r" (noun, verb, adjective, adverb). hypernyms: names of what it is a kind of, the nearest first, up to the root.
    offset: of its synset in WordNet's data file, None elsewhere. synonyms: the synset's other words. source: the
    dictionary's name.
    """

    lemma: str
    definition: str
    pos: str = "n"
    hypernyms: tuple[str, ...] = ()
    offset: int | None = None
    synonyms: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    source: str = ""

    @property
    def wnid(self) -> str | None:
        """ImageNet's name of the synset, such as "n01440764"; None outside WordNet."""
        return None if self.offset is None else f"{self.pos}{self.offset:08d}"


@dataclass(frozen=True, slots=True)
class Match:
    """What was found under a name.

    kind: "exact": as it stands, case aside; "underscored": blanks, hyphens, points or accents differ; "lemma": a base
    form, one of several names given, or the name without its parentheses; "head noun": something more general (or,
    where the last word says what kind of thing it is, the words before it); "none": nothing.
    form: the spelling under which it was found. senses: the best first; empty where the kind is "none".
    """

    name: str
    kind: str
    form: str
    senses: tuple[Sense, ...]

    @property
    def covered(self) -> bool:
        """Whether there is any sense."""
        return bool(self.senses)

    @property
    def read_as(self) -> str:
        """How the name is read: by its word, where it is a WordNet id."""
        first = self.senses[0] if self.senses else None
        return first.lemma if first is not None and first.wnid == self.name.strip() else self.name
