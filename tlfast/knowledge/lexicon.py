"""How a class name is looked for among the entries of one dictionary."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence

from ..data.errors import InputError
from .dictionary import Dictionary
from .inflection import base_forms
from .names import PREPOSITIONS, ClassName, content_words, fold, take_apart
from .sense import Match, Sense

ALL_POS = "nvar"


class Lexicon(Dictionary):
    """Entries, each with its senses.

    `find` looks for a name in four steps, each tried only where the ones before found nothing:
    as it stands; spelled otherwise (blanks, hyphens, points, accents); its base form, each of several names ("a / b",
    "a or b"), without parentheses; its head noun. What was left out on the way (parentheses, modifiers) still helps:
    senses come first that are a kind of it ("crane bird", "kite (bird of prey)") or are defined by the same words
    ("metal nail").
    """

    blanks = True  # whether names of several words are spelled with blanks

    @abstractmethod
    def _written(self, form: str, pos: str) -> list[Sense]:
        """Senses of a folded form under this very spelling, case aside, for the parts of speech in `pos`."""

    @abstractmethod
    def _respelled(self, form: str, pos: str) -> list[Sense]:
        """Senses under spellings that `names.collapse` makes alike."""

    def _bases(self, form: str, pos: str) -> Iterable[str]:
        """Folded base forms of a folded form for one part of speech."""
        return base_forms(form, pos)

    def _above(self, sense: Sense) -> frozenset[str]:
        """Folded names of all that the sense is a kind of."""
        return frozenset(map(fold, sense.hypernyms))

    def find(self, name: str, back_off: bool = True) -> Match:
        """As every dictionary: the four steps."""
        text = " ".join(name.replace("_", " ").split())
        if not text:
            raise InputError(f"name {name!r}: is empty; pass a word or several")
        form = text.casefold()
        if senses := self._written(form, ALL_POS):
            kind = "exact" if self.blanks or " " not in form else "underscored"
            return Match(name, kind, text, tuple(_by_case(text, senses)))
        if senses := self._respelled(form, ALL_POS):
            return Match(name, "underscored", text, tuple(_by_case(text, senses)))
        parts = take_apart(text)
        return self._by_lemma(name, parts) or (self._by_head(name, parts) if back_off else None) or _nothing(name)

    def _by_lemma(self, name: str, parts: ClassName) -> Match | None:
        for alternative in dict.fromkeys((parts.text, *parts.alternatives)):
            # the first half of "vaulted or arched ceiling" is no noun and no name either
            pos = ALL_POS if alternative == parts.text or len(parts.alternatives) == 1 else "n"
            senses = self._any_form(alternative, pos)
            if senses:
                return Match(name, "lemma", alternative, self._ranked(alternative, senses, parts.qualifiers))
        return None

    def _any_form(self, text: str, pos: str = "n") -> list[Sense]:
        """Senses of a name as it stands, spelled otherwise, or of its base forms."""
        form = text.casefold()
        found = self._written(form, pos) or self._respelled(form, pos)
        if found:
            return found
        for part in pos:
            for base in self._bases(form, part):
                found += self._written(base, part) or self._respelled(base, part)
        return list(dict.fromkeys(found))

    def _by_head(self, name: str, parts: ClassName) -> Match | None:
        for qualifier in parts.qualifiers:
            for alternative in take_apart(qualifier).alternatives:
                if senses := self._any_form(alternative):
                    return Match(name, "head noun", alternative, self._ranked(alternative, senses, (parts.text,)))
        for alternative in parts.alternatives:
            words = alternative.split()
            for head, dropped, must_be in _heads(words):
                senses = self._any_form(head)
                if must_be:
                    kind = must_be.casefold()
                    senses = [sense for sense in senses if kind in self._above(sense)]
                if senses:
                    return Match(name, "head noun", head, self._ranked(head, senses, (*parts.qualifiers, dropped)))
        return None

    def _ranked(self, text: str, senses: Sequence[Sense], context: tuple[str, ...]) -> tuple[Sense, ...]:
        """Only senses that are a kind of what the context names, if any are; sharers of most words first."""
        if len(senses) < 2:
            return tuple(senses)
        ordered = _by_case(text, senses)
        names, words = set(map(fold, context)), content_words(" ".join(context))
        if not words:
            return tuple(ordered)
        of_kind = [sense for sense in ordered if names & self._above(sense)] or ordered

        def shared(sense: Sense) -> int:
            return len(words & content_words(" ".join((sense.definition, *sense.synonyms, *self._above(sense)))))

        return tuple(sorted(of_kind, key=shared, reverse=True))


def _by_case(text: str, senses: Sequence[Sense]) -> list[Sense]:
    """A name in small letters means common nouns before proper ones: "crane" is no Stephen Crane."""
    if not text.islower():
        return list(senses)
    return sorted(senses, key=lambda sense: (ALL_POS.index(sense.pos), not sense.lemma.islower()))


def _nothing(name: str) -> Match:
    return Match(name, "none", "", ())


def _heads(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """(head, what is dropped, what the head must be a kind of or ""), the likeliest first.

    "hen of the woods mushroom": a prefix with its preposition. "crane bird": words that name a kind of the rest.
    "loggerhead sea turtle": the longest end of the name. "bunch of grapes": ends of what precedes the preposition.
    """
    small = [word.casefold() for word in words]
    at = next((i for i in range(1, len(words)) if small[i] in PREPOSITIONS), len(words))
    for end in range(len(words) - 1, at + 1, -1):
        yield " ".join(words[:end]), " ".join(words[end:]), ""
    for end in range(len(words) - 1, 0, -1):
        rest = " ".join(words[end:])
        yield " ".join(words[:end]), rest, rest
    for start in range(1, at):
        yield " ".join(words[start:at]), " ".join(words[:start]), ""
    if at < len(words):
        yield " ".join(words[:at]), " ".join(words[at:]), ""
        for start in range(at + 1, len(words)):
            yield " ".join(words[start:]), " ".join(words[:start]), ""
