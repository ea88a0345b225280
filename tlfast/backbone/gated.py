"""A frozen gated feed-forward: gates and what they gate are one weight, whose product applies the activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..ops.frozen_linear import FrozenWeight, frozen_linear
from .linear import FrozenLinear


class GatedFeedForward(nn.Module):
    """down(activation(gate x) * up x) in the place of transformers' module, with its names for the three layers.

    names: of gate, up and down. activation: as ops.frozen_linear calls it. x: (..., D) in float32 or bfloat16.
    """

    def __init__(self, names: Sequence[str], gated: FrozenWeight, down: FrozenLinear, activation: str) -> None:
        super().__init__()
        gate, up, self._down = names
        self.activation = activation
        self.gates_and_up = FrozenLinear(gated)
        self.add_module(gate, Half(self.gates_and_up, 0))
        self.add_module(up, Half(self.gates_and_up, 1))
        self.add_module(self._down, down)

    @property
    def names(self) -> list[str]:
        """Of gate, up and down in this module."""
        return [*(name for name, child in self.named_children() if isinstance(child, Half)), self._down]

    @property
    def down(self) -> FrozenLinear:
        """The layer that gives the result."""
        return self.get_submodule(self._down)  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(frozen_linear(x, self.gates_and_up.stored, self.activation))


class Half(nn.Module):
    """The gates, or what they gate: their weight (N, K) and bias (N,) in float32. They are computed together."""

    def __init__(self, both: FrozenLinear, index: int) -> None:
        super().__init__()
        self._both, self._index = [both], index  # in a list: the weights belong to the feed-forward

    @property
    def both(self) -> FrozenLinear:
        """The layer that gives activation(gates) * rest."""
        return self._both[0]

    @property
    def weight(self) -> torch.Tensor:
        return self.both.weight.chunk(2)[self._index]

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.both.bias
        return None if bias is None else bias.chunk(2)[self._index]
