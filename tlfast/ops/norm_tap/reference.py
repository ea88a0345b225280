"""The formula of sum, norm and quantisation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..quantise_rows.reference import quantise_rows

Quantised = tuple[torch.Tensor, torch.Tensor]


def norm_tap(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    quantise: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor, Quantised | None]:
    total = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual is not None:
        total = total + residual
    if rms:
        y = F.rms_norm(total, total.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    quantised = None if quantise is None else quantise_rows(y, None, quantise)
    return None if residual is None else total.to(x.dtype), y.to(x.dtype), quantised
