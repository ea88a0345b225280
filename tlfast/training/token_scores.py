"""What logits of tokens are worth: tags, and the tokens of a language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import IGNORED
from ..data.entities import are_bio, entities
from .generation import generate_ids, until_end
from .scores import Scores, Scoring, precision_recall_f1

_LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)


class TagScoring(Scoring):
    """Tags: logits (B, S, C), labels (B, S) with -100 where no word begins. names: the tags in the logits' order."""

    more_is_better = True

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.bio = are_bio(names)
        self.metric = "f1" if self.bio else "accuracy"

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The predicted tags, (B, S)."""
        return logits.argmax(dim=-1)

    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """Accuracy over tagged words; for BIO tags precision, recall and F1 of whole entities, as conlleval."""
        pairs = [self._tags(p, w) for p, w in zip(kept, labels, strict=True)]
        right = [a == b for predicted, wanted in pairs for a, b in zip(predicted, wanted, strict=True)]
        accuracy = float(np.mean(right))
        if not self.bio:
            return {"accuracy": accuracy}
        found = [(entities(predicted), entities(wanted)) for predicted, wanted in pairs]
        counts = (sum(len(p & w) for p, w in found), sum(len(p) for p, _ in found), sum(len(w) for _, w in found))
        precision, recall, f1 = precision_recall_f1(*counts)
        return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}

    def _tags(self, predicted: np.ndarray, wanted: Sequence[int]) -> tuple[list[str], list[str]]:
        words = [(p, w) for p, w in zip(predicted, wanted, strict=False) if w != IGNORED]  # either may be padded
        return [self.names[p] for p, _ in words], [self.names[w] for _, w in words]


class NextTokenScoring(Scoring):
    """A language model: logits (B, S, V), of which each predicts the label of the next position; labels (B, S)."""

    metric, more_is_better = "loss", False
    largest_batch = 8

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of cross-entropies, tokens predicted right, and tokens: (B, 3) float64. -100 labels count nowhere."""
        return self._sums(logits[:, :-1], labels[:, 1:])

    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """Mean cross-entropy a token, its exponential (None where that is no float), accuracy over tokens."""
        loss, right, tokens = np.sum(np.asarray(kept), axis=0).tolist()
        loss /= tokens
        perplexity = None if loss > _LARGEST_EXPONENT else math.exp(loss)
        return {"loss": loss, "perplexity": perplexity, "accuracy": right / tokens, "tokens": int(tokens)}

    def _sums(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = []
        for row, wanted in zip(logits, labels, strict=True):  # one at a time: a float32 copy of all would be large
            row, wanted = row[wanted != IGNORED].float(), wanted[wanted != IGNORED]
            losses = F.cross_entropy(row, wanted, reduction="none").double()
            right = (row.argmax(dim=-1) == wanted).double()
            rows.append(torch.stack([losses.sum(), right.sum(), torch.ones_like(losses).sum()]))
        return torch.stack(rows)


class TargetScoring(NextTokenScoring):
    """An encoder-decoder: logits (B, T, V) of the target tokens, labels (B, T), from which the decoder reads."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All of it: the decoder's inputs are made from the labels."""
        return batch

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum of cross-entropies, tokens predicted right, and tokens: (B, 3) float64. -100 labels count nowhere."""
        return self._sums(logits, labels)

    def test_scores(self, model: nn.Module, dataset: Any, collate: Any) -> Scores:
        """exact_match: the share of examples for which greedy generation gives the target's text."""
        longest = max(map(len, dataset.labels))
        ends = {self.tokenizer.eos_token_id, collate.pad_token_id}
        generated = generate_ids(model, dataset, collate, longest, self.tokenizer)
        texts, wanted = (
            [self.tokenizer.decode(until_end(ids, ends)) for ids in rows] for rows in (generated, dataset.labels)
        )
        return {"exact_match": float(np.mean([a == b for a, b in zip(texts, wanted, strict=True)]))}
