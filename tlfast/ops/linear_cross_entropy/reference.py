"""The cross-entropy of a linear layer in plain PyTorch, with all its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .head import Head


def linear_cross_entropy(hidden: torch.Tensor, head: Head, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden * head.scale, head.matrix(hidden.dtype)).to(wide)
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    if head.bias is not None:
        logits = logits + head.bias.to(wide)
    return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
