"""The frozen linear layer before a cross-entropy, as its implementations read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..frozen_linear import FrozenWeight, frozen_linear

DENSE = "dense"  # what stands for a FrozenWeight's precision where the weight is a plain tensor


@dataclass(frozen=True)
class Head:
    """logits = cap tanh(W (scale h) / cap) + bias. weight: (V, D) or a FrozenWeight. bias: (V,). cap, bias or None."""

    weight: torch.Tensor | FrozenWeight
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        if isinstance(self.weight, FrozenWeight):
            return self.weight.outputs, self.weight.inputs
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """W (V, D) as it is stored, in a dtype; what is stored in it already is not copied."""
        weight = self.weight.value() if isinstance(self.weight, FrozenWeight) else self.weight
        return weight.to(dtype)

    def read_in(self, dtype: torch.dtype) -> Head:
        """The same with a plain weight in a dtype, so that no product has to cast it."""
        return self if isinstance(self.weight, FrozenWeight) else replace(self, weight=self.matrix(dtype))

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """What W multiplies."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """W (scale h): hidden (T, D) in a plain weight's dtype to (T, V), in it, in float32 of a FrozenWeight."""
        if isinstance(self.weight, FrozenWeight):
            return frozen_linear(self.scaled(hidden), self.weight, out_dtype=torch.float32)
        return F.linear(self.scaled(hidden), self.weight)
