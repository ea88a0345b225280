"""The formula of a rung in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rung(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    mu = torch.sigmoid(alpha / temperature)
    projected = F.linear(h, weight.to(h.dtype)).to(torch.promote_types(s.dtype, weight.dtype))
    if bias is not None:
        projected = projected + bias
    return (mu * s + (1 - mu) * projected).to(s.dtype)
