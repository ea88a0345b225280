"""The formula of a feed-forward in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._activations import ACTIVATIONS


def feed_forward(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    activate = ACTIVATIONS[activation]
    if gate_weight is None:
        hidden = activate(F.linear(x, up_weight, up_bias))
    else:
        hidden = activate(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
    return F.linear(hidden, down_weight, down_bias)
