"""The weights of a feed-forward."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Weights(NamedTuple):
    """R width, F hidden channels; None where absent, gate_weight of one that is not gated."""

    up_weight: torch.Tensor  # (F, R)
    up_bias: torch.Tensor | None
    down_weight: torch.Tensor  # (R, F)
    down_bias: torch.Tensor | None
    gate_weight: torch.Tensor | None  # (F, R)
    gate_bias: torch.Tensor | None
