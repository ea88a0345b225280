"""LoRA as a plan needs it: what peft puts beside a linear layer, on tensors without memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..backbone.parts import is_linear


class Adapted(nn.Module):
    """W x + B A x, with A (rank, K) and B (N, rank) in float32, as peft's default computes it."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        weight: Any = base.weight
        inputs, outputs = weight.shape if type(base).__name__ == "Conv1D" else weight.shape[::-1]
        self.base = base
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def adapter(self) -> list[torch.Tensor]:
        """What is trained."""
        return [self.down.weight, self.up.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return (y + self.up(self.down(x.to(self.down.weight.dtype))) * 2.0).to(y.dtype)


def add_lora(model: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Adapt a model's linear layers whose paths end like one of `targets`; returns how many.

    Source: Hu et al., "LoRA", ICLR 2022 (arXiv 2106.09685).
    """
    found = [
        (owner, name, child)
        for path, owner in model.named_modules()
        for name, child in owner.named_children()
        if is_linear(child) and _is_meant(f"{path}.{name}", targets)
    ]
    for owner, name, child in found:
        setattr(owner, name, Adapted(child, rank))
    return len(found)


def _is_meant(path: str, targets: Sequence[str]) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)
