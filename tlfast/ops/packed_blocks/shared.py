"""Float32 weights of a block, read where the model has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .._shared_weight import PARTS
from ..frozen_linear import ACTIVATE
from ..frozen_linear.panels import PANEL, padded


@dataclass(frozen=True)
class SharedWeight:
    """Up to three float32 matrices (N_i, K) with the same inputs and strides, multiplied as one; nothing is copied.

    Their outputs lie side by side, each filled up to whole panels of 32. gated: there are two, the gates and what they
    gate, and the layer gives activation(gates) * rest. bias: float32 for all outputs so filled, or None; of a gated
    weight in turns of 16.
    """

    parts: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None
    gated: bool = False

    precision = "fp32"

    @classmethod
    def of(
        cls, parts: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None] | None = None, gated: bool = False
    ) -> SharedWeight:
        """biases: (N_i,) each, or None.

        Raises ValueError for parts that are not float32 matrices of the same inputs and strides, or too many.
        """
        parts = tuple(part.detach() for part in parts)
        first, most = parts[0], 2 if gated else PARTS
        alike = all(part.dim() == 2 and part.dtype == torch.float32 for part in parts)
        if not alike or any(part.stride() != first.stride() or part.shape[1] != first.shape[1] for part in parts):
            given = ", ".join(f"{part.dtype} {tuple(part.shape)} {part.stride()}" for part in parts)
            raise ValueError(f"parts must be float32 matrices of the same inputs and strides, not {given}")
        if len(parts) > most or (gated and (len(parts) != most or parts[0].shape != parts[1].shape)):
            allowed = "two of one shape where gated" if gated else f"at most {PARTS}"
            raise ValueError(f"parts must be {allowed}, not {[tuple(part.shape) for part in parts]}")
        biases = [None] * len(parts) if biases is None else biases
        if all(bias is None for bias in biases):
            return cls(parts, None, gated)
        whole = [part.new_zeros(len(part)) if b is None else b.detach() for part, b in zip(parts, biases, strict=True)]
        if not gated:
            return cls(parts, torch.cat([F.pad(bias, (0, -len(bias) % PANEL)) for bias in whole]), gated)
        turns = [F.pad(bias, (0, -len(bias) % (PANEL // 2))).unflatten(0, (-1, PANEL // 2)) for bias in whole]
        return cls(parts, F.pad(bias := torch.stack(turns, dim=1).flatten(), (0, -len(bias) % PANEL)), gated)

    @property
    def inputs(self) -> int:
        """K."""
        return self.parts[0].shape[1]

    @property
    def outputs(self) -> int:
        """Outputs, those that fill up a panel counted where another part follows."""
        if self.gated or len(self.parts) == 1:
            return sum(len(part) for part in self.parts)
        return sum(padded(len(part)) for part in self.parts)

    @property
    def width(self) -> int:
        """Outputs of the layer: half the weight's where it is gated."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts[0].device

    def linear(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """(..., K) to (..., width): the layer in plain PyTorch."""
        products = [F.linear(x, part) for part in self.parts]
        if not self.gated:
            if len(products) > 1:
                products = [F.pad(product, (0, -product.shape[-1] % PANEL)) for product in products]
            y = torch.cat(products, dim=-1)
            return ACTIVATE[activation](y if self.bias is None else y + self.bias[: y.shape[-1]])
        if self.bias is not None:
            turns = self.bias.unflatten(0, (-1, 2, PANEL // 2))
            products = [y + turns[:, side].flatten()[: self.width] for side, y in enumerate(products)]
        gates, rest = products
        return ACTIVATE[activation](gates) * rest
