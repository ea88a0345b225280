"""generate() for ladders: transformers' own generation loop, with the ladder's forward in the model's place."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .tasks import GENERATION

if TYPE_CHECKING:
    from .model import LadderModel


def generator(ladder: LadderModel) -> Any:
    """The backbone as a transformers model whose forward is the ladder's.

    It is of a subclass of the backbone's own class and shares its modules: generation settings, cache and the
    preparation of inputs are what transformers does for that model.
    Raises ValueError for a ladder that does not generate.
    """
    if ladder.task not in GENERATION:
        raise ValueError(
            f"generate: a ladder for {ladder.task!r} does not generate; train one with task="
            + " or ".join(map(repr, GENERATION))
        )
    if ladder.side_encoder is not None and not ladder.calibrated:
        raise ValueError(
            "generate: this ladder has no starting weights yet, and a source alone does not give them; train it, or "
            "pass calibration= to LadderModel"
        )
    own: Any = type(ladder.backbone.model)
    model: Any = object.__new__(_ladder_class(own))
    model.__dict__.update(ladder.backbone.model.__dict__)
    model.__dict__["_ladder"] = ladder  # not as a module of it: the ladder holds this backbone
    return model


@functools.cache
def _ladder_class(own: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._ladder(*args, **kwargs)

    # transformers checks the arguments of generate by the signature, and asks it whether logits_to_keep is known
    signature = inspect.signature(own.forward)  # type: ignore[attr-defined]
    forward.__signature__ = signature  # type: ignore[attr-defined]

    def get_encoder(self: Any, *_: Any, **__: Any) -> nn.Module:
        return _Encoder(self._ladder)

    # with a static cache transformers makes a mask of every pair of positions, and compiles; a ladder makes its own
    # masks, and its part of the cache grows
    def create_masks_for_generate(_self: Any, attention_mask: Any = None, **_: Any) -> Any:
        return attention_mask

    def _valid_auto_compile_criteria(*_: Any, **__: Any) -> bool:
        return False

    overridden = (forward, get_encoder, create_masks_for_generate, _valid_auto_compile_criteria)
    return type(f"Ladder{own.__name__}", (own,), {function.__name__: function for function in overridden})


class _Encoder(nn.Module):
    """The encoder half of a ladder, as generate runs it once for all steps."""

    def __init__(self, ladder: LadderModel) -> None:
        super().__init__()
        self.__dict__["ladder"] = ladder  # not as a module of it

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        ladder: LadderModel = self.__dict__["ladder"]
        output, side = ladder.encode(**{name: value for name, value in given.items() if value is not None})
        return _encoder_output()(last_hidden_state=output.last_hidden_state, side_hidden_state=side)


@functools.cache
def _encoder_output() -> type:
    """A transformers ModelOutput, so that beam search expands both tensors; made late: it imports transformers."""
    from transformers.utils import ModelOutput

    @dataclass
    class LadderEncoderOutput(ModelOutput):
        last_hidden_state: torch.Tensor | None = None
        side_hidden_state: torch.Tensor | None = None

    return LadderEncoderOutput
