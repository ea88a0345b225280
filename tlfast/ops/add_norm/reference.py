"""The formula of add & norm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..dropout import dropout


def sum_and_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    u = residual + (x if seed is None else dropout(x, dropout_p, seed))
    if norm == "rms":
        return u, F.rms_norm(u, weight.shape, weight.to(u.dtype), eps)
    return u, F.layer_norm(u, weight.shape, weight.to(u.dtype), None if bias is None else bias.to(u.dtype), eps)
