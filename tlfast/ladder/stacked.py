"""Ladders of equal shape as one: their side networks and heads are computed together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..backbone import BackboneOutput
from ..backbone.parts import BlockSpec
from .heads import ClassifierHead
from .stacked_heads import StackedHeads
from .stacked_sides import StackedSides

if TYPE_CHECKING:
    from .model import LadderModel


class SideShape(NamedTuple):
    """What ladders must have in common to be stacked; tasks, heads, gates and temperatures may differ."""

    taps: tuple[int, ...]
    block: BlockSpec
    dtype: torch.dtype

    @classmethod
    def of(cls, ladder: LadderModel) -> SideShape | None:
        """None for a ladder that runs alone: an encoder-decoder, or one that shares a bias or projects its taps."""
        spec = ladder.side.blocks[0].spec
        assert isinstance(spec, BlockSpec)
        side = ladder.side
        projects = side.embedding.basis is not None
        if ladder.side_encoder is not None or side.relative_bias is not None or spec.cross or projects:
            return None
        spec = dataclasses.replace(spec, hidden_dropout=0.0, attention_dropout=0.0)
        return cls(ladder.backbone.tap_indices, spec, ladder.side.embedding.weight.dtype)


class LadderStack:
    """K ladders of one `SideShape` as one; their weights are copies, taken when it is made.

    Called with the backbone's output (its taps those of the shape), a (B, S) mask of tokens and position_ids; returns
    each ladder's logits, as its climb() does.
    """

    def __init__(self, ladders: Sequence[LadderModel]) -> None:
        heads: list[Any] = [ladder.head for ladder in ladders]
        self.ladders = ladders
        self.sides = StackedSides([ladder.side for ladder in ladders])
        self.classifiers = [i for i, head in enumerate(heads) if isinstance(head, ClassifierHead)]
        self.heads = StackedHeads([heads[i] for i in self.classifiers])
        parameters = [p for ladder in ladders for part in (ladder.side, ladder.head) for p in part.parameters()]
        self._parameters = [p for p in parameters if not p.is_inference()]  # those cannot be trained, nor counted
        self._places = [ladder.side.embedding.weight for ladder in ladders]
        self._state = self._seen()

    def is_current(self) -> bool:
        """Whether no weight of a ladder was written to since, in place or by moving the ladder."""
        return self._state == self._seen()

    def _seen(self) -> tuple[int, ...]:
        """Versions only grow, so their sum tells whether any did; moving a ladder moves all its parameters."""
        written = sum(parameter._version for parameter in self._parameters)
        return written, *(parameter.data_ptr() for parameter in self._places)

    def __call__(
        self, output: BackboneOutput, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> list[torch.Tensor]:
        key_mask = None if attention_mask is None else attention_mask.bool()
        side = self.sides(output, key_mask, position_ids)
        last = output.last_hidden_state
        last = last.to(torch.promote_types(last.dtype, side.dtype))
        logits: dict[int, torch.Tensor] = {}
        if self.classifiers:
            mask = last.new_ones(last.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
            read = side if len(self.classifiers) == len(side) else side[self.classifiers]
            logits.update(zip(self.classifiers, self.heads(read, last, mask), strict=True))
        for index, ladder in enumerate(self.ladders):
            if index not in logits:
                logits[index] = ladder._logits(side[index], last, None)
        return [logits[index] for index in range(len(side))]
