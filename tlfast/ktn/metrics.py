"""How well log-probabilities rank and name labels, as KTN's paper counts and as the field does."""

from __future__ import annotations

import torch


def scores(log_probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """accuracy, micro_f1, macro_f1, ndcg, ndcg_paper and mrr in [0, 1], over the rows of labels that are not all 0.

    log_probabilities, labels: (nodes, classes); labels are weights, one-hot where a node has one label.

    accuracy: the likeliest class has the largest weight (with one label a node, micro F1 is the same number). macro_f1:
    mean of F1 over the classes that occur as label or prediction. ndcg: over the whole ranking, the gain at rank i
    divided by log2(i + 1); ndcg_paper: by 1 for rank 1 and log2(i) beyond, so that ranks 1 and 2 count alike. mrr: mean
    of 1 / first rank with a positive weight.
    Raises ValueError where no row has a label.
    """
    if log_probabilities.shape != labels.shape:
        given = tuple(log_probabilities.shape), tuple(labels.shape)
        raise ValueError(
            f"log_probabilities and labels must have one shape (nodes, classes), not {given[0]}, {given[1]}"
        )
    labelled = labels.sum(1) > 0
    if not bool(labelled.any()):
        raise ValueError("labels must have a label in at least one row; all are 0")
    gains, predicted = labels[labelled].to(torch.float64), log_probabilities[labelled]
    ranked = gains.gather(1, predicted.argsort(dim=1, descending=True, stable=True))
    truth, guess = gains.argmax(1), predicted.argmax(1)
    micro = float((truth == guess).double().mean())
    return {
        "accuracy": micro,
        "micro_f1": micro,
        "macro_f1": _macro_f1(truth, guess),
        "ndcg": _ndcg(ranked, offset=1),
        "ndcg_paper": _ndcg(ranked, offset=0),
        "mrr": float((1.0 / ((ranked > 0).to(torch.int64).argmax(1) + 1).double()).mean()),
    }


def _ndcg(ranked: torch.Tensor, offset: int) -> float:
    ranks = torch.arange(1, ranked.shape[1] + 1, dtype=torch.float64, device=ranked.device)
    discount = 1.0 / torch.log2(ranks + offset).clamp(min=1.0)
    best = ranked.sort(dim=1, descending=True).values
    return float(((ranked * discount).sum(1) / (best * discount).sum(1)).mean())


def _macro_f1(truth: torch.Tensor, guess: torch.Tensor) -> float:
    values = []
    for label in torch.cat([truth, guess]).unique():
        hits = int(((truth == label) & (guess == label)).sum())
        values.append(2 * hits / (int((truth == label).sum()) + int((guess == label).sum())))
    return sum(values) / len(values)
