"""The classifier heads of several ladders; what they read of the backbone is pooled and multiplied once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .heads import ClassifierHead, SequenceHead, pool
from .stacked_layers import exact, rounded


class StackedHeads:
    """Logits of K classifier heads, which may differ in pooling and number of labels.

    A head is linear in both states it reads, so it folds into one matrix for each: logits = A h + M s + c.
    Called with side (K, B, S, R), last (B, S, D) and mask (B, S) bool; returns each head's logits.
    """

    def __init__(self, heads: Sequence[ClassifierHead]) -> None:
        self.readings: dict[str | None, list[int]] = {}
        for index, head in enumerate(heads):
            self.readings.setdefault(head.pooling if isinstance(head, SequenceHead) else None, []).append(index)
        folded = [_fold(head) for head in heads]
        self.from_side = [side for _, side, _ in folded]
        self.labels = [head.classifier.out_features for head in heads]
        self.from_last = {
            reading: (torch.cat([folded[i][0] for i in members]), torch.cat([folded[i][2] for i in members]))
            for reading, members in self.readings.items()
        }

    def __call__(self, side: torch.Tensor, last: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        logits: dict[int, torch.Tensor] = {}
        for reading, members in self.readings.items():
            own = F.linear(_read(last, mask, reading), *self.from_last[reading])
            read = _read(side.flatten(0, 1), mask.repeat(len(side), 1), reading).unflatten(0, side.shape[:2])
            parts = own.split([self.labels[index] for index in members], dim=-1)
            for index, part in zip(members, parts, strict=True):
                rows = torch.addmm(part.flatten(0, -2), read[index].flatten(0, -2), self.from_side[index])
                logits[index] = rows.view(part.shape)
        return [logits[index] for index in range(len(side))]


def _read(x: torch.Tensor, mask: torch.Tensor, pooling: str | None) -> torch.Tensor:
    return x if pooling is None else pool(x, mask, pooling)


def _fold(head: ClassifierHead) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (L, D), M (R, L) and c (L,)."""
    weight, bias, up, offset = (
        exact([x])[0] for x in (head.classifier.weight, head.classifier.bias, head.up.weight, head.up.bias)
    )
    mu, rest = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    if head.alpha is not None:
        gate = exact([head.alpha.detach().double() / head.temperature])[0]
        mu, rest = torch.sigmoid(gate), torch.sigmoid(-gate)
    folded = (mu * weight, (rest * weight @ up).T, rest * weight @ offset + bias)
    like = head.classifier.weight
    return rounded(folded[0], like), rounded(folded[1], like), rounded(folded[2], like)
