"""Prompts within a token budget: whole words, whole clauses, chunks; and class embeddings from them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlfast.data import InputError
from tlfast.knowledge import Sense, TokenBudget, chunk, embed_classes, make_prompts, read_templates, shorten
from tlfast.knowledge.prompts import TEMPLATES
from tlfast.knowledge.shortening import clauses

LONG = "any of numerous small rodents (typically) like rats, having pointed snouts; with slender tails"
CRANE = Sense("crane", "large long-necked wading bird of marshes; found in many parts of the world")
TEXTS = st.lists(st.sampled_from(["a", "bird", "long-necked", "(usually)", "of,", "marshes;", "that", "--", "x."]))


def count(text):
    """Two tokens that mark the ends, one for each four letters of a word."""
    return 2 + sum(-(-len(word) // 4) for word in text.split())


def budget(tokens):
    return TokenBudget(count, tokens)


def one(tokens, sense=CRANE, templates=TEMPLATES, fitting="auto"):
    return make_prompts(["crane"], [sense], budget(tokens), templates, fitting)[0]


def test_a_definition_that_fits_is_whole_as_klite_writes_it():
    made = one(77)
    assert made.names == ("a photo of a crane.",)
    assert made.knowledge == ((f"a photo of a crane. ; crane , {CRANE.definition}",),)
    assert (made.fitted, made.sense, made.name) == ("whole", CRANE, "crane")


def test_a_long_definition_ends_with_a_clause():
    made = one(27)
    assert made.knowledge == (("a photo of a crane. ; crane , large long-necked wading bird of marshes",),)
    assert made.fitted == "shortened"


def test_sixteen_tokens_deal_the_definition_out():
    made = one(16)
    assert made.fitted == "chunks"
    (texts,) = made.knowledge
    assert texts[0] == "a photo of a crane." and len(texts) == 3
    assert " ".join(text.removeprefix("crane , ") for text in texts[1:]) == CRANE.definition
    assert all(count(text) <= 16 for text in texts)


def test_shortened_at_words_where_no_clause_fits():
    made = one(22, fitting="shorten")
    assert made.knowledge == (("a photo of a crane. ; crane , large long-necked wading bird",),)
    assert made.fitted == "shortened"
    assert one(13, fitting="shorten").knowledge == (("a photo of a crane.",),), "no room for a word"
    assert one(13, fitting="shorten").fitted == "none"


def test_a_clause_that_says_too_little_is_dealt_out_instead():
    person = Sense("crane", "person who is quiet or timid and stays away from others")
    assert one(20, person).fitted == "chunks"
    assert one(77, Sense("crane", "a bird")).fitted == "whole", "short as it is"


def test_several_templates_and_a_class_without_a_sense():
    templates = ("a photo of a {}.", "art of the {}.")
    crane, zeta = make_prompts(["crane", "zeta"], [CRANE, None], budget(77), templates)
    assert crane.names == ("a photo of a crane.", "art of the crane.")
    assert [texts[0].partition(" ; ")[0] for texts in crane.knowledge] == list(crane.names)
    assert zeta.knowledge == (("a photo of a zeta.",), ("art of the zeta.",))
    assert (zeta.fitted, zeta.sense) == ("none", None)


@given(words=TEXTS, tokens=st.integers(9, 40), fitting=st.sampled_from(["auto", "shorten", "chunk"]))
def test_no_text_exceeds_the_budget_and_no_word_is_cut(words, tokens, fitting):
    definition = " ".join(words) or "bird"
    made = one(tokens, Sense("crane", definition), ("{}",), fitting)
    allowed = {word.rstrip(",;.-(") for word in definition.split()} | {"crane", ";", ","} | set(definition.split())
    for text in (*made.names, *(text for texts in made.knowledge for text in texts)):
        assert count(text) <= tokens
        assert set(text.split()) <= allowed
    if made.fitted == "chunks":
        assert " ".join(text.removeprefix("crane , ") for text in made.knowledge[0][1:]) == definition


@given(words=TEXTS, limit=st.integers(1, 60))
def test_pieces_are_the_text_and_a_shortened_text_begins_it(words, limit):
    text = " ".join(words)
    assert " ".join(clauses(text)) == text
    pieces = chunk(text, lambda piece: len(piece) <= limit)
    if pieces is not None:
        assert " ".join(pieces) == text and all(len(piece) <= limit for piece in pieces)
    else:
        assert max(map(len, words)) > limit
    cut = shorten(text, lambda piece: len(piece) <= limit)
    if cut is not None:
        assert text.startswith(cut) and len(cut) <= limit
        assert cut == text or cut.count("(") == cut.count(")")


@pytest.mark.parametrize(
    ("limit", "cut"),
    [
        (200, LONG),
        (80, "any of numerous small rodents (typically) like rats, having pointed snouts"),
        (60, "any of numerous small rodents (typically) like rats"),
        (45, "any of numerous small rodents (typically)"),
        (35, "any of numerous small rodents"),
        (20, None),
    ],
)
def test_where_a_definition_may_end(limit, cut):
    assert shorten(LONG, lambda text: len(text) <= limit) == cut


def test_words_that_announce_more_do_not_end_it():
    text = "white bird with long neck and (usually) long bill"
    assert shorten(text, lambda part: len(part) <= 40) == "white bird with long neck"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"templates": ()}, "templates: there are none"),
        ({"templates": ("a photo",)}, "template 'a photo': needs {} once"),
        ({"templates": ("{} and {}",)}, "needs {} once"),
        ({"templates": ("{0}",)}, "needs {} once"),
        ({"fitting": "cut"}, "fitting: 'cut' is not available; allowed: 'auto', 'shorten', 'chunk'"),
        ({"tokens": 7}, "class 'crane': 'a photo of a crane.' has 9 tokens, and the encoder takes 7; shorten the"),
        ({"tokens": 0}, "max_tokens: 0 is no number of tokens"),
        (
            {"tokens": 9, "sense": Sense("crane", "incomprehensibilities")},
            "class 'crane': beside the name there is no room for the words of its definition in 9 tokens",
        ),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError) as error:
        one(**{"tokens": 77, **arguments})
    assert message in str(error.value)


def test_as_many_senses_as_names():
    with pytest.raises(InputError, match="senses: there are 1 for 2 names"):
        make_prompts(["a", "b"], [None], budget(77))


def test_templates_of_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}.\n\n  art of the {}. \n")
    assert read_templates(path) == ["a photo of a {}.", "art of the {}."]
    path.write_text("a photo\n")
    with pytest.raises(InputError, match="template 'a photo'"):
        read_templates(path)


@pytest.fixture(scope="module")
def clip_tokenizer():
    """CLIP's own scheme, byte pairs with a mark at the end of a word, without merges; 16 tokens as OWL-ViT's."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])


def test_a_transformers_tokenizer_counts_its_special_tokens(clip_tokenizer):
    sixteen = TokenBudget.of_tokenizer(clip_tokenizer, 16)
    assert sixteen.count("abc d") == 2 + 4
    assert sixteen.fits("abcdefghijklmn") and not sixteen.fits("abcdefghijklmno")
    assert TokenBudget.of_tokenizer(clip_tokenizer).max_tokens == clip_tokenizer.model_max_length
    made = make_prompts(["ox"], [Sense("ox", "a bull; of a herd")], sixteen, ("{}",))[0]
    assert made.knowledge == (("ox", "ox , a bull;", "ox , of a herd"),)


# embeddings


def encode(texts):
    """(N, 8) unit vectors that depend on the text alone."""
    draws = [np.random.default_rng(list(text.encode())).normal(size=8) for text in texts]
    return np.stack([draw / np.linalg.norm(draw) for draw in draws]) * 3  # embed() normalises


def unit(vector):
    return vector / np.linalg.norm(vector)


def mean_of(texts):
    return np.mean([encode([text])[0] / 3 for text in texts], axis=0)


def test_embeddings_are_means_over_pieces_then_templates():
    prompts = make_prompts(["crane", "zeta"], [CRANE, None], budget(16), ("a {}", "the {}"))
    found = embed_classes(prompts, encode)
    groups = prompts[0].knowledge
    assert [len(group) for group in groups] == [3, 3]
    knowledge = unit(np.mean([mean_of(group) for group in groups], axis=0))
    names = unit(mean_of(["a crane", "the crane"]))
    np.testing.assert_allclose(found.knowledge[0], knowledge, rtol=0, atol=4 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(found.names[0], names, rtol=0, atol=4 * np.finfo(np.float32).eps)
    assert torch.equal(found.names[1], found.knowledge[1]), "a class without knowledge has none to blend"
    expected = unit(0.7 * names + 0.3 * knowledge)
    np.testing.assert_allclose(found.blend(0.3)[0], expected, rtol=0, atol=4 * np.finfo(np.float32).eps)
    torch.testing.assert_close(found.blend(0), found.names)
    torch.testing.assert_close(found.blend(1), found.knowledge)


def test_each_text_is_encoded_once():
    asked = []

    def watched(texts):
        asked.extend(texts)
        return encode(texts)

    embed_classes(make_prompts(["crane", "zeta"], [CRANE, None], budget(16), ("a {}", "the {}")), watched)
    assert len(asked) == len(set(asked))


def test_the_dev_set_chooses_the_weight():
    prompts = make_prompts(["crane", "zeta", "eta"], [CRANE, Sense("zeta", "a bolt"), None], budget(77))
    found = embed_classes(prompts, encode)
    labels = torch.tensor([0, 1, 2, 0])
    for of, best in ((found.names, 0.0), (found.knowledge, 1.0)):
        images = 5 * of[labels]
        weight, accuracies = found.choose_weight(images, labels, weights=(0.0, 1.0) if best == 0 else (1.0,))
        assert (weight, accuracies[weight]) == (best, 1.0)
    away = found.knowledge[labels] - 2 * found.names[labels]
    weight, accuracies = found.choose_weight(away, labels)
    assert list(accuracies) == [step / 10 for step in range(11)]
    assert accuracies[weight] == max(accuracies.values())
    assert weight == min(w for w, accuracy in accuracies.items() if accuracy == accuracies[weight])
    assert found.accuracy(away, labels, weight) == accuracies[weight]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.ones(2, 7), torch.tensor([0, 1]), r"must be \(N, 8\) and \(N,\)"),
        (torch.ones(2, 8), torch.tensor([0]), r"shapes \(2, 8\) and \(1,\)"),
        (torch.ones(0, 8), torch.tensor([]).long(), "N at least 1"),
        (torch.ones(2, 8), torch.tensor([0, 2]), "labels: from 0 to 2; must be rows of the 2 classes"),
        (torch.ones(2, 8), torch.tensor([-1, 0]), "labels: from -1 to 0"),
    ],
)
def test_dev_sets_that_do_not_fit(images, labels, message):
    found = embed_classes(make_prompts(["crane", "zeta"], [CRANE, None], budget(77)), encode)
    with pytest.raises(ValueError, match=message):
        found.choose_weight(images, labels)


def test_other_misuse():
    found = embed_classes(make_prompts(["crane"], [CRANE], budget(77)), encode)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            found.blend(weight)
    with pytest.raises(ValueError, match="prompts: there are none"):
        embed_classes([], encode)
