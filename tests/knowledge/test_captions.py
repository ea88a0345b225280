"""Captions with the definition of their rarest known noun."""

import pytest

from tests.knowledge.small_wordnet import offset_of
from tlfast.knowledge import TokenBudget, augment_captions


def words(limit):
    return TokenBudget(lambda text: len(text.split()), limit)


def noun(caption, others, wordnet):
    return augment_captions([caption, *others], wordnet, words(99))[0].noun


def test_the_rarest_noun_is_defined(wordnet):
    captions = ["a shark and a turtle", "a turtle at a well", "zzz"]
    first, second, third = augment_captions(captions, wordnet, words(99))
    assert first.knowledge == "a shark and a turtle ; shark , elongate fish with teeth"
    assert first.sense.offset == offset_of("shark")
    assert second.noun == "turtle" and third.knowledge is third.noun is None
    assert [made.plain for made in (first, second, third)] == captions


@pytest.mark.parametrize(
    ("caption", "others", "found"),
    [
        ("mice by the sea turtle", [], "sea turtle"),  # two words that are known together
        ("three mice", [], "mice"),
        ("A Hen in a hat", ["a hen"], "hat"),
        ("a crane and a bird", ["bird", "bird"], "bird"),  # a crane could be a verb
        ("the crane is here", [], "crane"),
        ("stretch well", [], None),  # a verb, an adverb
        ("", [], None),
    ],
)
def test_which_noun(wordnet, caption, others, found):
    assert noun(caption, others, wordnet) == found


def test_function_words_are_no_nouns(real_wordnet):
    assert noun("it is in a us at the", [], real_wordnet) is None
    assert noun("a dachshund sits on the grass", ["grass", "grass"], real_wordnet) == "dachshund"


def test_definitions_keep_to_the_budget(wordnet):
    caption = "a white thing , great white shark"
    assert augment_captions([caption], wordnet, words(13))[0].knowledge is None
    (made,) = augment_captions(["a mouse of mine"], wordnet, words(8))
    assert made.knowledge is None
    long = augment_captions(["a man-eating shark"], wordnet, words(11))[0]
    assert long.noun == "man-eating shark" and long.knowledge.endswith("; man-eating shark , large aggressive shark")
