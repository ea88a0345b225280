"""How a model chooses among answers: by a head that scores each, or, of a language model, by how likely each is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def choose(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, answers: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    """Logits (B, C) of the answers.

    input_ids, attention_mask, answers (1 at the tokens of an answer): (B, C, S), padded on the right, as any others.
    A class of transformers for multiple choice gives them itself. Of a language model an answer's logit is the log of
    its probability after its question, summed over its tokens, as the original evaluates (arXiv 2302.04870, section 4).
    """
    if not writes(model):
        return model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
    rows = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
    logits = model(**{name: tensor.flatten(0, 1) for name, tensor in rows.items()}).logits
    tokens, told = input_ids.flatten(0, 1)[:, 1:], answers.flatten(0, 1)[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), tokens, reduction="none")
    return -(losses * told).sum(dim=1).view(answers.shape[:2])


class Chooser(nn.Module):
    """A plugged model that answers: forward takes what `choose` takes, and returns the logits of the answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        """Logits (B, C)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=choose(self.model, **inputs))


def writes(model: nn.Module) -> bool:
    """Whether it is a language model."""
    return bool(model.can_generate())  # type: ignore[operator]
