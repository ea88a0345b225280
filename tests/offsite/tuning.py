"""Tuning the same way on either side, in a few plain steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tests.models import inputs_of
from tlfast.offsite import TaskSpec

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "mistral", "bert", "roberta", "distilbert", "t5-encoder", "vit")
FAMILIES += ("clip-vision",)
IMAGES = ("vit", "clip-vision")
LANGUAGE = ("gpt2", "opt", "llama", "qwen2", "mistral")
LABELS = 3


def spec_of(family: str) -> TaskSpec:
    """The task that a family is tuned for here."""
    if family in LANGUAGE:
        return TaskSpec("causal-lm", pad_token_id=1)
    if family in IMAGES:
        return TaskSpec("image-classification", LABELS)
    if family == "t5-encoder":
        return TaskSpec("token-classification", LABELS)
    names = ("no", "perhaps", "yes")
    return TaskSpec("sequence-classification", LABELS, "single_label_classification", names)


def batches_of(family: str, count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Labelled batches for that task."""
    batches = []
    for seed in range(count):
        batch, task = inputs_of(family, seed), spec_of(family).name
        if task == "causal-lm":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        elif task == "token-classification":
            batch["labels"] = (batch["input_ids"] % LABELS).masked_fill(batch["attention_mask"] == 0, -100)
        else:
            batch["labels"] = torch.tensor([2, 0, 1]).roll(seed)
        batches.append(batch)
    return batches


def tune(model: nn.Module, parameters: Iterable[torch.Tensor], batches: list[dict[str, Any]]) -> None:
    """A step of AdamW a batch, with dropout from a fixed seed."""
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-2)
    torch.manual_seed(7)
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
