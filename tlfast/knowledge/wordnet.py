"""WordNet from its dict files: Debian's wordnet-base, Princeton's dict/, or NLTK's copy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.errors import InputError
from .inflection import base_forms
from .lexicon import ALL_POS, Lexicon
from .names import collapse, fold
from .sense import Match, Sense
from .wndb import FILES, DataFile, Synset, find_folder, parse_offsets, read_exceptions, read_index

_WNID = re.compile(r"[nvar]\d{8}")
_WNID_VERSION = "3.0"
Key = tuple[str, int]


class WordNet(Lexicon):
    """WordNet (Miller, CACM 1995), version 3.0 where ImageNet's wnids are to mean what they do there.

    folder: with index.noun and data.noun, or the one above dict/; None: $TLFAST_WORDNET, $WNSEARCHDIR, $WNHOME/dict and
    the usual places. Senses come nouns first, then in WordNet's order of use. Hypernyms are followed by synset offset,
    so a sense's are its own and not those of the word's first sense. A name may be a wnid ("n01440764").
    Raises InputError where there is no WordNet, or its files are malformed or do not belong together.
    """

    name = "WordNet"
    blanks = False

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = find_folder(folder)
        self._index: dict[str, dict[str, str]] = {}
        for pos, suffix in FILES.items():
            self._index[pos], version = read_index(self.folder / f"index.{suffix}")
            if pos == "n":
                self.version = version
        self._data = {pos: DataFile(self.folder / f"data.{suffix}", pos) for pos, suffix in FILES.items()}
        self._exceptions = {pos: read_exceptions(self.folder / f"{suffix}.exc") for pos, suffix in FILES.items()}
        self._collapsed: dict[str, list[str]] | None = None
        self._synsets: dict[Key, Synset] = {}
        self._chains: dict[Key, tuple[str, ...]] = {}
        self._words_above: dict[Key, frozenset[str]] = {}

    def __reduce__(self) -> Any:
        return WordNet, (self.folder,)  # mapped files do not travel to other processes

    def find(self, name: str, back_off: bool = True) -> Match:
        """As every dictionary; a wnid finds its synset."""
        if _WNID.fullmatch(name.strip()):
            return Match(name, "exact", name.strip(), (self.synset(name.strip()),))
        return super().find(name, back_off)

    def synset(self, wnid: str) -> Sense:
        """The sense that ImageNet calls by a letter and an offset, such as "n01440764".

        Raises InputError for another form, a number that is none, and where this is not WordNet 3.0.
        """
        if not _WNID.fullmatch(wnid):
            raise InputError(f"wnid {wnid!r}: must be n, v, a or r and eight digits, such as n01440764")
        if self.version not in (None, _WNID_VERSION):
            raise InputError(
                f"wnid {wnid!r}: means WordNet {_WNID_VERSION}, and {self.folder} is {self.version}; pass a folder "
                f"of {_WNID_VERSION}"
            )
        synset = self._synset((wnid[0], int(wnid[1:])))
        return self._sense(synset, synset.words[0])

    def hypernyms(self, sense: Sense) -> list[Sense]:
        """All synsets that a sense is directly a kind (or an instance) of."""
        if sense.offset is None:
            raise InputError(f"sense {sense.lemma!r}: is not of WordNet; look it up there first")
        parents = map(self._synset, self._synset((sense.pos, sense.offset)).parents)
        return [self._sense(synset, synset.words[0]) for synset in parents]

    def _written(self, form: str, pos: str) -> list[Sense]:
        return self._entry(form.replace(" ", "_"), pos)

    def _respelled(self, form: str, pos: str) -> list[Sense]:
        if self._collapsed is None:
            self._collapsed = {}
            for part in ALL_POS:
                for lemma in self._index[part]:
                    if not lemma.isalnum():
                        self._collapsed.setdefault(collapse(lemma), []).append(lemma)
        key = collapse(form)
        lemmas = dict.fromkeys((*self._collapsed.get(key, ()), key))
        return [sense for lemma in lemmas for sense in self._entry(lemma, pos)]

    def _bases(self, form: str, pos: str) -> Iterable[str]:
        return base_forms(form, pos, self._exceptions[pos])

    def _above(self, sense: Sense) -> frozenset[str]:
        assert sense.offset is not None
        return self._ancestors((sense.pos, sense.offset))

    def _entry(self, lemma: str, pos: str) -> list[Sense]:
        """The senses on the index lines of a lemma."""
        found = []
        for part in pos:
            rest = self._index[part].get(lemma)
            if rest is not None:
                written = lemma.replace("_", " ")
                for offset in self._offsets(part, lemma, rest):
                    synset = self._synset((part, offset))
                    found.append(self._sense(synset, _spelling(synset, written)))
        return found

    def _offsets(self, pos: str, lemma: str, rest: str) -> list[int]:
        try:
            return parse_offsets(rest)
        except (ValueError, IndexError):
            path = self.folder / f"index.{FILES[pos]}"
            raise InputError(
                f"{path}: the line of {lemma!r} is malformed ({rest[:60]!r}); install WordNet again"
            ) from None

    def _synset(self, key: Key) -> Synset:
        synset = self._synsets.get(key)
        if synset is None:
            synset = self._synsets[key] = self._data[key[0]].synset(key[1])
        return synset

    def _sense(self, synset: Synset, lemma: str) -> Sense:
        synonyms = tuple(word for word in synset.words if word != lemma)
        chain = self._chain((synset.pos, synset.offset))
        return Sense(
            lemma, synset.definition, synset.pos, chain, synset.offset, synonyms, synset.examples, source=self.name
        )

    def _chain(self, key: Key) -> tuple[str, ...]:
        """Names up to the root, along the first hypernym of each synset."""
        chain = self._chains.get(key)
        if chain is None:
            self._chains[key] = chain = ()  # where a circle would come back to it
            for above in self._synset(key).parents[:1]:
                chain = (self._synset(above).words[0], *self._chain(above))
            self._chains[key] = chain
        return chain

    def _ancestors(self, key: Key) -> frozenset[str]:
        """Folded words of all synsets above, along every hypernym."""
        found = self._words_above.get(key)
        if found is None:
            seen: set[Key] = {key}
            waiting = list(self._synset(key).parents)
            while waiting:
                above = waiting.pop()
                if above not in seen:
                    seen.add(above)
                    waiting += self._synset(above).parents
            words = (word for above in seen - {key} for word in self._synset(above).words)
            found = self._words_above[key] = frozenset(map(fold, words))
        return found


def _spelling(synset: Synset, lemma: str) -> str:
    """The synset's word that an index line in small letters means."""
    return next((word for word in synset.words if word.lower() == lemma), lemma)
