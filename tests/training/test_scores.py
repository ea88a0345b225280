"""Scores against their definitions, scikit-learn, and a second reading of the CoNLL rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

from tlfast.data.entities import are_bio, complete_scheme, entities
from tlfast.training.scores import ClassScoring, NumberScoring, SetScoring
from tlfast.training.token_scores import NextTokenScoring, TagScoring, TargetScoring


def test_scores_agree_with_their_definitions():
    random = np.random.default_rng(0)
    logits, classes = random.normal(size=(50, 3)), random.integers(0, 3, 50)
    got = ClassScoring().score(logits, classes)
    assert got["accuracy"] == np.mean(logits.argmax(1) == classes)
    loss = nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(classes)).item()
    assert got["loss"] == pytest.approx(loss, rel=1e-12)
    predicted, wanted = random.normal(size=50), random.normal(size=50)
    got = NumberScoring().score(predicted[:, None], wanted)
    assert got["pearson"] == pytest.approx(np.corrcoef(predicted, wanted)[0, 1], rel=1e-12)
    assert got["mse"] == pytest.approx(np.mean((predicted - wanted) ** 2), rel=1e-12)
    assert NumberScoring().score(np.ones((50, 1)), wanted)["pearson"] is None


@pytest.mark.parametrize("seed", range(4))
def test_sets_of_classes_are_scored_as_by_scikit_learn(seed):
    random = np.random.default_rng(seed)
    logits, wanted = random.normal(size=(40, 4)), random.integers(0, 2, (40, 4))
    logits[:, 3], wanted[:, 3] = -1, 0  # a class that is neither there nor predicted
    got = SetScoring().score(list(logits), wanted.astype(float).tolist())
    predicted = (logits > 0).astype(int)
    assert got["accuracy"] == accuracy_score(wanted, predicted)
    assert got["micro_f1"] == pytest.approx(f1_score(wanted, predicted, average="micro"), rel=1e-12)
    assert got["macro_f1"] == pytest.approx(f1_score(wanted, predicted, average="macro", zero_division=0), rel=1e-12)
    loss = nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(wanted).double())
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-12)


# entities


def conlleval(tags):
    """The state machine of the evaluation script of CoNLL-2000, for tags without brackets, E and S."""
    found, begun, kind = set(), None, ""
    previous, previous_kind = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        now, now_kind = tag[:1], tag[2:]
        ends = (previous in "BI" and now in "BO") or (previous != "O" and previous_kind != now_kind)
        starts = now == "B" or (previous == "O" and now == "I") or (now != "O" and previous_kind != now_kind)
        if ends and begun is not None:
            found.add((begun, i, kind))
            begun = None
        if starts:
            begun, kind = i, now_kind
        previous, previous_kind = now, now_kind
    return found


TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y"]


@given(st.lists(st.sampled_from(TAGS), max_size=9))
def test_entities_are_those_of_conlleval(tags):
    assert entities(tags) == conlleval(tags)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-X I-X O B-X", {(0, 2, "X"), (3, 4, "X")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("B-X I-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("I-X I-X O", {(0, 2, "X")}),
        ("O B-A-B I-A-B", {(1, 3, "A-B")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_of_known_sentences(tags, found):
    assert entities(tags.split()) == found


def test_schemes_are_told_apart_and_completed():
    assert are_bio(["O", "B-X", "I-X"])
    assert are_bio(["B-X"])
    assert not any(map(are_bio, (["O"], ["NN", "VB"], ["B-"], ["B-X", "E-X"], ["O", "X"])))
    assert complete_scheme({"B-X", "I-Y"}) == {"O", "B-X", "I-X", "B-Y", "I-Y"}
    assert complete_scheme({"NN", "VB"}) == {"NN", "VB"}


def logits_for(rows, classes):
    """Logits of which the largest is at the given class."""
    return nn.functional.one_hot(torch.tensor(rows), classes).float()


def test_tags_are_scored_at_first_tokens_by_entities():
    scoring = TagScoring(TAGS)
    wanted = [[-100, 1, -100, 2, 0, -100], [-100, 3, 0, -100, -100, -100]]
    predicted = [[4, 1, 3, 2, 0, 0], [0, 3, 1, 2, 2, 2]]
    kept = scoring.reduce(logits_for(predicted, 5), torch.tensor(wanted)).numpy()
    got = scoring.score(kept, wanted)
    # true: X at words 0-1, Y at word 0 of the second; predicted: both, and an X at its word 1
    assert got == {"accuracy": 4 / 5, "precision": 2 / 3, "recall": 1.0, "f1": 4 / 5}
    assert scoring.metric == "f1"
    short = [row[:-1] for row in wanted]  # what an unpadded dataset has
    assert scoring.score(list(kept), short) == got


def test_tags_without_entities_have_an_accuracy_alone():
    scoring = TagScoring(["NN", "VB"])
    assert scoring.score([np.array([0, 1, 1])], [[0, 0, -100]]) == {"accuracy": 0.5}
    assert scoring.metric == "accuracy"


def test_no_entity_predicted_and_none_there_give_zeros():
    scoring = TagScoring(TAGS)
    assert scoring.score([np.array([0])], [[0]]) == {"accuracy": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


# language models


def test_next_tokens_are_scored_by_the_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 6), generator=generator)
    labels[0, 4:], labels[2, :3] = -100, -100
    scoring = NextTokenScoring()
    parts = [scoring.reduce(logits[i : i + 1], labels[i : i + 1]).numpy() for i in range(3)]
    got = scoring.score(np.concatenate(parts), labels.tolist())
    flat, targets = logits[:, :-1].reshape(-1, 11).double(), labels[:, 1:].reshape(-1)
    loss = nn.functional.cross_entropy(flat, targets, ignore_index=-100).item()
    assert got["loss"] == pytest.approx(loss, rel=1e-6)  # the logits are float32
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    real = targets != -100
    assert got["tokens"] == real.sum().item()
    assert got["accuracy"] == pytest.approx((flat.argmax(1) == targets)[real].double().mean().item(), rel=1e-12)


def test_targets_are_not_shifted():
    logits, labels = logits_for([[1, 2, 0, 0]], 3), torch.tensor([[1, 2, 1, -100]])
    got = TargetScoring(tokenizer=None).reduce(logits, labels)
    assert got[0, 1:].tolist() == [2, 3]


def test_a_loss_beyond_floats_has_no_perplexity():
    got = NextTokenScoring().score(np.array([[8000.0, 0, 10]]), [[0] * 11])
    assert got == {"loss": 800.0, "perplexity": None, "accuracy": 0.0, "tokens": 10}


def test_a_block_of_ignored_tokens_counts_nothing():
    got = NextTokenScoring().reduce(torch.randn(1, 4, 5), torch.full((1, 4), -100))
    assert got.tolist() == [[0, 0, 0]]
