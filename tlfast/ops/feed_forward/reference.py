"""The formula of a feed-forward in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._activations import ACTIVATIONS
from .weights import Weights


def feed_forward(x: torch.Tensor, w: Weights, activation: str) -> torch.Tensor:
    activate = ACTIVATIONS[activation]
    if w.gate_weight is None:
        hidden = activate(F.linear(x, w.up_weight, w.up_bias))
    else:
        hidden = activate(F.linear(x, w.gate_weight, w.gate_bias)) * F.linear(x, w.up_weight, w.up_bias)
    return F.linear(hidden, w.down_weight, w.down_bias)
