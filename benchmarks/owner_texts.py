"""General texts for the owner of a model, who has none of the data owner's: for distillation and alignment.

Of WordNet ($TLFAST_WORDNET, or where it is found): definitions and example sentences, and questions made of its nouns.
Of $TLFAST_TEXTS: a file with a text a line. The figures in results/ have there the product reviews, editorials and
tweets that are published with VADER (Hutto and Gilbert 2014, ICWSM; additional_resources/ of the vaderSentiment source
package), without its film reviews, which SST-2 is made of too.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tlfast.data import InputError
from tlfast.knowledge.wndb import find_folder

COUNT = 64_000  # half of them questions
FEWEST_WORDS = 3
OF_PEOPLE = ("Who was {}?", "Who is the {} of {}?", "What did {} do?", "What {} was the first to see {}?")
OF_PLACES = ("Where is {}?", "What is the population of {}?", "Which {} is near {}?", "How far is it from {} to {}?")
OF_TIMES = ("When is {}?", "How long is a {}?", "What year did {} begin?")
OF_ANYTHING = (
    "What is {}?",
    "What does {} mean?",
    "What is a {} made of?",
    "How many {} are there in a {}?",
    "Why does {} need {}?",
    "How does {} work?",
    "What kind of {} is {}?",
    "Name a {}.",
    "When was {} invented?",
    "What is the difference between {} and {}?",
    "What is another word for {}?",
)
BY_LEXICOGRAPHER_FILE = {"15": OF_PLACES, "18": OF_PEOPLE, "28": OF_TIMES}  # lexnames(5WN)
SPECIFIC = 0.7  # the share of such a noun's questions that are of its kind


def owner_texts() -> list[str]:
    """Texts in random order, always the same. Skips where WordNet or $TLFAST_TEXTS is missing."""
    given = os.environ.get("TLFAST_TEXTS")
    if not given:
        pytest.skip("no general texts: set TLFAST_TEXTS to a file with a text a line")
    try:
        wordnet = find_folder()
    except InputError as error:
        pytest.skip(str(error))
    draw = random.Random(0)
    texts = [text for text in _lines(Path(given)) if len(text.split()) >= FEWEST_WORDS]
    definitions = _definitions(wordnet)
    draw.shuffle(definitions)
    texts = [*texts, *definitions][: COUNT // 2]
    texts += _questions(wordnet, COUNT - len(texts), draw)
    draw.shuffle(texts)
    return texts


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _synsets(wordnet: Path, pos: str) -> list[str]:
    return [line for line in _lines(wordnet / f"data.{pos}") if not line.startswith("  ")]


def _definitions(wordnet: Path) -> list[str]:
    glosses = [line.partition("| ")[2] for pos in ("noun", "verb", "adj", "adv") for line in _synsets(wordnet, pos)]
    parts = [part.strip().strip('"') for gloss in glosses for part in gloss.split("; ")]
    return [part for part in parts if len(part.split()) >= FEWEST_WORDS]


def _questions(wordnet: Path, count: int, draw: random.Random) -> list[str]:
    fields = [line.split(" ") for line in _synsets(wordnet, "noun")]
    nouns = [(field[1], field[4].replace("_", " ")) for field in fields]
    draw.shuffle(nouns)
    texts = []
    for (kind, noun), (_, other) in zip(nouns[:count], reversed(nouns), strict=False):
        of_its_kind = BY_LEXICOGRAPHER_FILE.get(kind, OF_ANYTHING)
        forms = of_its_kind if draw.random() < SPECIFIC else OF_ANYTHING
        texts.append(draw.choice(forms).format(noun, other))
    return texts
