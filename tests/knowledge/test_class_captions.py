"""Captions of several classes: what fits, what is shared, and which token belongs to which class."""

import re

import pytest
import torch

from tlfast.data import InputError
from tlfast.knowledge import Sense, TokenBudget, make_class_captions

NAMES = ["crane", "computer mouse", "St. Bernard"]
SENSES = [
    Sense("crane", "large wading bird of marshes; found in many parts of the world"),
    None,
    Sense("St. Bernard", "a large dog. Is it one? Formerly used to rescue lost travellers, in the Alps"),
]


def words(text):
    """(start, end) of each word and sign."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def budget(tokens):
    return TokenBudget(lambda text: 2 + len(words(text)), tokens)


def test_all_classes_stand_in_one_caption_with_whole_definitions():
    (caption,) = make_class_captions(NAMES, SENSES, budget(256))
    assert caption.text == (
        "crane , large wading bird of marshes; found in many parts of the world . computer mouse . "
        "St Bernard , a large dog Is it one Formerly used to rescue lost travellers, in the Alps ."
    )
    assert caption.names == ("crane", "computer mouse", "St Bernard")
    assert [caption.text[start:end] for start, end in caption.spans] == list(caption.names)


@pytest.mark.parametrize("tokens", range(10, 45))
def test_definitions_share_what_names_leave(tokens):
    (caption,) = make_class_captions(NAMES, SENSES, budget(tokens))
    assert budget(tokens).fits(caption.text)
    assert [caption.text[start:end] for start, end in caption.spans] == list(caption.names)
    assert caption.text.count(" . ") == 2 and caption.text.endswith(" .")
    for phrase, sense in zip(caption.text[:-2].split(" . "), SENSES, strict=True):
        said = phrase.partition(" , ")[2]
        assert not said or re.sub(" *[.?]", "", sense.definition).startswith(said)


def test_more_tokens_never_say_less():
    said = [make_class_captions(NAMES, SENSES, budget(tokens))[0].text for tokens in (10, 20, 26, 256)]
    assert sorted(said, key=len) == said and len(set(said)) > 2


def test_names_that_do_not_fit_together_get_captions_of_their_own():
    made = make_class_captions(NAMES, SENSES, budget(6))
    assert [caption.names for caption in made] == [("crane",), ("computer mouse",), ("St Bernard",)]
    assert all(budget(6).fits(caption.text) for caption in made)
    assert make_class_captions([], [], budget(6)) == []


@pytest.mark.parametrize(("name", "message"), [("a b c d", "does not fit"), ("?", "is empty")])
def test_what_cannot_be_a_class_is_named(name, message):
    with pytest.raises(InputError, match=message):
        make_class_captions([name], [None], budget(6))


def test_as_many_senses_as_names():
    with pytest.raises(InputError, match="there are 1 for 2 names"):
        make_class_captions(["a", "b"], [None], budget(6))


def test_a_class_scores_as_the_best_token_of_its_name():
    (caption,) = make_class_captions(NAMES, SENSES, budget(256))
    offsets = [(0, 0), *words(caption.text), (0, 0)]
    logits = torch.full((2, 3, 256), float("-inf"))  # beyond the caption, as the model leaves it
    logits[..., : len(offsets)] = torch.randn(2, 3, len(offsets), generator=torch.Generator().manual_seed(0))
    found = caption.scores(logits, offsets)
    named = [caption.text[start:end] for start, end in offsets]
    expected = [
        [named.index("crane")],
        [named.index("computer"), named.index("mouse")],
        [named.index("St"), named.index("Bernard")],
    ]
    assert torch.equal(found, torch.stack([logits[..., own].amax(-1) for own in expected], -1).sigmoid())


def test_offsets_that_do_not_fit():
    (caption,) = make_class_captions(NAMES, SENSES, budget(256))
    offsets = words(caption.text)
    with pytest.raises(ValueError, match="must be"):
        caption.scores(torch.zeros(1, 5), offsets)
    with pytest.raises(ValueError, match="no token is of 'St Bernard'"):
        caption.scores(torch.zeros(1, 256), [pair for pair in offsets if pair[0] < caption.spans[-1][0]])
