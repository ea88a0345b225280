"""Knowledge of captions: the rarest noun that a dictionary knows, and its definition behind the caption (K-LITE)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .dictionary import Dictionary
from .prompts import TokenBudget
from .sense import Sense
from .shortening import shorten

_WORD = re.compile(r"[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*")
# function words that are nouns too: "in" the inch, "it" the technology; a single letter never counts
_FUNCTION = frozenset(
    """
    about above across after against all along amid among an and any are around as at be because been before
    behind being below beneath beside between beyond both but by can could did do does down during each either
    else ever every few for from get had has have he her here hers him his how if in inside into is it its just
    like many may me might mine more most much must my near neither next no nor not now of off on once one only
    onto or other our out outside over own past per same shall she should so some such than that the their them
    then there these they this those through till to too toward towards under until up upon us very was we were
    what when where which while who whom whose why will with within without would yet you your
    """.split()  # noqa: SIM905 - a list of so many short words is not read more easily
)


@dataclass(frozen=True)
class CaptionText:
    """A caption, and the same with knowledge: None where no noun is known or no words of its definition fit."""

    plain: str
    knowledge: str | None = None
    noun: str | None = None
    sense: Sense | None = None


def augment_captions(captions: Sequence[str], dictionary: Dictionary, budget: TokenBudget) -> list[CaptionText]:
    """Captions as "two cranes in a marsh ; cranes , large long-necked wading bird".

    The noun is the rarest among all captions of those the dictionary knows, two words that it knows together before one
    ("fire engine"); words that are nouns alone come before those that are verbs or adjectives too, since nothing here
    parses sentences. Its first sense counts. Definitions are cut at clauses to stay within the budget.
    Source: Shen et al., "K-LITE", NeurIPS 2022 (arXiv 2204.09222), section 3.2; it takes nouns from a parser.
    """
    words = [_phrases(caption) for caption in captions]
    counts = Counter(phrase for found in words for phrase in set(found))
    nouns: dict[str, Sense | None] = {}
    for phrase in counts:
        nouns[phrase] = _noun(phrase, dictionary)
    sure = {phrase: _only_noun(phrase, dictionary) for phrase, sense in nouns.items() if sense is not None}
    made = []
    for caption, found in zip(captions, words, strict=True):
        known = [phrase for phrase in found if phrase in sure]
        best = min(known, key=lambda phrase: (not sure[phrase], counts[phrase], -len(phrase)), default=None)
        made.append(CaptionText(caption) if best is None else _augmented(caption, best, nouns[best], budget))
    return made


def _augmented(caption: str, noun: str, sense: Sense | None, budget: TokenBudget) -> CaptionText:
    assert sense is not None
    said = shorten(sense.definition, lambda text: budget.fits(f"{caption} ; {noun} , {text}"))
    if not said:
        return CaptionText(caption)
    return CaptionText(caption, f"{caption} ; {noun} , {said}", noun, sense)


def _phrases(caption: str) -> list[str]:
    """Its words that are no function words, and pairs of words that follow each other, in small letters."""
    words = [word.casefold() for word in _WORD.findall(caption)]
    pairs = [f"{a} {b}" for a, b in pairwise(words) if not {a, b} & _FUNCTION]
    return list(dict.fromkeys([*pairs, *(word for word in words if word not in _FUNCTION and len(word) > 1)]))


def _noun(phrase: str, dictionary: Dictionary) -> Sense | None:
    """The first sense of a phrase that is known as it stands or by its base form, if that is a noun."""
    senses = dictionary.lookup(phrase, back_off=False)
    return senses[0] if senses and senses[0].pos == "n" else None


def _only_noun(phrase: str, dictionary: Dictionary) -> bool:
    """Whether it is no other part of speech."""
    return all(sense.pos == "n" for sense in dictionary.lookup(phrase, back_off=False))
