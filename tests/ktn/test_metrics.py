"""Scores against scikit-learn and against KTN's own way of counting."""

import math

import pytest
import torch

from tlfast.ktn import scores


def paper_ndcg(gains):
    def dcg(values):
        return values[0] + sum(gain / math.log2(rank) for rank, gain in enumerate(values[1:], 2))

    return dcg(gains) / dcg(sorted(gains, reverse=True))


def make(classes=7, nodes=60):
    torch.manual_seed(0)
    labels = torch.rand(nodes, classes) * (torch.rand(nodes, classes) < 0.4)
    labels[::9] = 0
    labels[1, 3] = 1.0
    return torch.log_softmax(torch.randn(nodes, classes), 1), labels


def test_ranking_is_counted_as_the_paper_does():
    predicted, labels = make()
    ranked = [
        [row[i] for i in order]
        for row, order in zip(labels.double().tolist(), predicted.argsort(1, True).tolist(), strict=True)
    ]
    ranked = [row for row in ranked if any(row)]
    found = scores(predicted, labels)
    assert abs(found["ndcg_paper"] - sum(map(paper_ndcg, ranked)) / len(ranked)) < 1e-12
    firsts = [1 / (1 + next(i for i, gain in enumerate(row) if gain > 0)) for row in ranked]
    assert abs(found["mrr"] - sum(firsts) / len(firsts)) < 1e-12


def test_the_rest_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, labels = make()
    found, kept = scores(predicted, labels), labels.sum(1) > 0
    truth, guess = labels[kept].argmax(1), predicted[kept].argmax(1)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guess), abs=1e-12)
    for average in ("micro", "macro"):
        assert found[f"{average}_f1"] == pytest.approx(metrics.f1_score(truth, guess, average=average), abs=1e-12)
    assert found["ndcg"] == pytest.approx(metrics.ndcg_score(labels[kept], predicted[kept]), abs=1e-6)


def test_a_right_prediction_scores_1_and_no_labels_are_refused():
    labels = torch.eye(4)
    assert set(scores(labels.log(), labels).values()) == {1.0}
    with pytest.raises(ValueError, match="at least one row"):
        scores(labels, labels * 0)
    with pytest.raises(ValueError, match="one shape"):
        scores(labels, labels[:2])
