"""Float32 weights of a block, read where the model has them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import _dispatch
from .._shared_weight import PARTS
from ..frozen_linear import ACTIVATE
from ..frozen_linear.panels import PANEL, padded

_ROWS = 1024  # fewer would have PyTorch's library lay the weights out too often


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
        """(T, K) to (T, width): the layer by PyTorch's products."""
        if self.gated:
            gates, rest = (F.linear(x, part, bias) for part, bias in zip(self.parts, self._biases(), strict=True))
            return ACTIVATE[activation](gates) * rest
        if len(self.parts) == 1:
            return ACTIVATE[activation](F.linear(x, self.parts[0], self._biases()[0]))
        return ACTIVATE[activation](self._side_by_side(x))

    def _side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """The parts' products, each filled up to whole panels."""
        if not _dispatch.runs_eagerly(x):
            products = [F.linear(x, *layer) for layer in zip(self.parts, self._biases(), strict=True)]
            return torch.cat([F.pad(product, (0, -product.shape[-1] % PANEL)) for product in products], dim=-1)
        y = x.new_zeros(len(x), self.outputs) if self._has_gaps else x.new_empty(len(x), self.outputs)
        self._write(x, y)
        return y

    def _write(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The parts' products to their places in y; what fills them up stays."""
        first = 0
        for part, bias in zip(self.parts, self._biases(), strict=True):
            place = y[:, first : first + len(part)]
            if bias is None:
                torch.mm(x, part.t(), out=place)
            else:
                torch.addmm(bias, x, part.t(), out=place)
            first += padded(len(part))

    def after(self, hidden: SharedWeight, activation: str, x: torch.Tensor) -> torch.Tensor:
        """This layer behind a hidden one and its activation, (T, K) to (T, width); this one has one part.

        Some rows at a time: what the hidden layer gives is then in a cache when it is read, and takes little memory.
        """
        if not _dispatch.runs_eagerly(x):
            return self.linear(hidden.linear(x, activation))
        y = x.new_empty(len(x), self.width)
        count = max(1, round(len(x) / _ROWS))  # even ones: a few rows more would lay the weights out once more
        for rows, places in zip(x.chunk(count), y.chunk(count), strict=True):
            self._write(hidden.linear(rows, activation), places)
        return y

    @property
    def _has_gaps(self) -> bool:
        return self.outputs > sum(map(len, self.parts))

    def _biases(self) -> list[torch.Tensor | None]:
        """The bias of each part, without what fills it up."""
        if self.bias is None:
            return [None] * len(self.parts)
        if self.gated:
            turns = self.bias.unflatten(0, (-1, 2, PANEL // 2))
            return [turns[:, side].flatten()[: self.width] for side in range(2)]
        firsts = [0, *itertools.accumulate(padded(len(part)) for part in self.parts)]
        return [self.bias[first : first + len(part)] for first, part in zip(firsts, self.parts, strict=False)]
