"""Rung: where a backbone tap enters the side network."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import rung


class Rung(nn.Module):
    """z = mu * s + (1 - mu) * (W h + b), mu = sigmoid(alpha / temperature), alpha = 0 at the start (mu = 0.5).

    tap_width D, width R. gate: "scalar" (one alpha) or "channel" (one a side channel).
    forward(h, s): h (..., D) from the frozen backbone, which gets no gradient; s (..., R). Returns z (..., R).
    Source: Sung et al. 2022 (arXiv 2206.06522), section 3.2; projections start at N(0, 0.01) as in its code.
    """

    def __init__(self, tap_width: int, width: int, temperature: float = 0.1, gate: str = "scalar") -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(width, tap_width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.alpha = nn.Parameter(torch.zeros(width if gate == "channel" else ()))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, h: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return rung(h, s, self.weight, self.bias, self.alpha, self.temperature)

    def extra_repr(self) -> str:
        """One line for print()."""
        return f"tap_width={self.weight.shape[1]}, width={self.weight.shape[0]}, temperature={self.temperature}"
