"""The formula of dropout and sum in plain PyTorch."""

from __future__ import annotations

import torch

from ..dropout import dropout


def dropout_add(x: torch.Tensor, residual: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return residual + dropout(x, p, seed)
