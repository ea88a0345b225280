"""Alignment: the plugged model's last blocks learn to give what the tuned emulator's give, on inputs of the owner's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..training.evaluation import evaluating
from .adapter import Adapter
from .architecture import base_of, find_blocks
from .block_map import BlockMap
from .distil import Distillation, descend, mismatch, real_tokens, run_to


def check_alignment(adapter: Adapter) -> None:
    """Raise ValueError where an adapter has no last blocks of its own that could be trained."""
    if adapter.method.name == "ladder" or not adapter.blocks.adapter[1]:
        what = "a ladder" if adapter.method.name == "ladder" else f"the adapter {adapter.blocks.adapter}"
        raise ValueError(f"alignment: {what} has no last blocks to train; leave it out")


def align(
    plugged: Any,
    emulator: Any,
    blocks: BlockMap,
    settings: Distillation,
    progress: Callable[[float], Any] = lambda loss: None,
) -> None:
    """Train the last blocks of a plugged model in place, against those of the tuned emulator.

    An adapter's last blocks and head were tuned on what an emulator's middle gives, and the full middle gives something
    else. Who has model, bundle and adapter can mend that without any data of the other's: loss = kd_weight
    mean(((t - s) / rms(t))^2), where t is what the emulator's last block gives and s what the plugged model's gives for
    the same input, both over the tokens that are no padding. Dropout is off; all but the last blocks stays as it is.

    plugged, emulator: transformers models with the same adapter and head. settings: lm_weight is not used.
    Raises FloatingPointError where the loss stops being finite.
    """
    count = blocks.adapter[1]
    student, teacher = base_of(plugged), base_of(emulator)
    full, small = find_blocks(student).blocks, find_blocks(teacher).blocks
    last = nn.ModuleList(list(full)[-count:])
    plugged.requires_grad_(False)
    last.requires_grad_(True)

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        with torch.no_grad():
            target = real_tokens(run_to(teacher, len(small) - 1, inputs), mask)
        return mismatch(target, real_tokens(run_to(student, len(full) - 1, inputs), mask), settings)

    with evaluating(plugged), evaluating(emulator):
        for loss in descend(last, settings, "alignment", loss_of):
            progress(loss)
    plugged.requires_grad_(True)
