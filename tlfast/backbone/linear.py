"""Frozen layers whose weights are stored in fewer bits, in the place of nn.Linear and nn.Embedding."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.frozen_linear import FrozenWeight, frozen_linear
from ..ops.frozen_linear.formats import int8_of
from ..ops.frozen_linear.layout import layout_for


class FrozenLinear(nn.Module):
    """y = x W^T + b with W stored once in "fp32", "bf16", "int8", "nf4" or "fp8"; nothing in it is trained.

    x: (..., K) in float32 or bfloat16. Returns (..., N) in the dtype of x. Builds no graph: an input that requires a
    gradient is refused by ValueError. weight and bias give W and b in float32, as they are stored. Moved to a GPU or
    back it is laid out anew for the kernels there; no number changes.
    """

    def __init__(self, stored: FrozenWeight) -> None:
        super().__init__()
        self.precision, self.out_features, self.in_features = stored.precision, stored.outputs, stored.inputs
        self.gated = stored.gated
        for name, tensor in _buffers(stored).items():
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, linear: nn.Linear, precision: str = "int8", smooth: torch.Tensor | None = None) -> Self:
        """Store a linear layer in float32. Raises ValueError as `FrozenWeight.of` does."""
        return cls(FrozenWeight.of(linear.weight, linear.bias, precision, smooth))

    @property
    def stored(self) -> FrozenWeight:
        """The weight and bias as the operation takes them."""
        own: Any = self
        return FrozenWeight(
            self.precision,
            self.out_features,
            self.in_features,
            own.values,
            own.scale,
            own.group_scale,
            own.smooth,
            own.offset,
            self.gated,
        )

    @property
    def weight(self) -> torch.Tensor:
        """(N, K) in float32: what is stored."""
        return self.stored.value()

    @property
    def bias(self) -> torch.Tensor | None:
        """(N,) in float32, or None."""
        return self.stored.bias_value()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.stored)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        stored = self.stored
        layout = layout_for(stored.device, self.precision)
        if stored.layout != layout and stored.device.type in ("cpu", "cuda"):
            self._buffers.update(_buffers(stored.in_layout(layout)))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}"


def _buffers(stored: FrozenWeight) -> dict[str, torch.Tensor | None]:
    names = ("values", "scale", "group_scale", "smooth")
    return {name: getattr(stored, name) for name in names} | {"offset": stored.bias}


class FrozenEmbedding(nn.Module):
    """A table of V rows of width D in bfloat16, or in int8 with a scale a row; gives float32.

    values: (V, D) in bfloat16 or int8. scale: (V,) float32 of int8 rows, else None.
    """

    def __init__(self, values: torch.Tensor, scale: torch.Tensor | None, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = values.shape
        self.padding_idx = padding_idx
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, embedding: nn.Embedding, precision: str) -> Self:
        """Store a float32 table in "bf16" or "int8". Raises ValueError for numbers that are not finite."""
        rows = embedding.weight.detach()
        if not torch.isfinite(rows).all():
            raise ValueError("an embedding holds NaN or infinity: it cannot be stored; look where the model comes from")
        values, scale = (rows.bfloat16(), None) if precision == "bf16" else int8_of(rows)
        return cls(values, scale, embedding.padding_idx)

    @property
    def weight(self) -> torch.Tensor:
        """(V, D) in float32: what is stored."""
        own: Any = self
        rows = own.values.float()
        return rows if own.scale is None else rows * own.scale[:, None]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) int to (..., D)."""
        own: Any = self
        rows = F.embedding(ids, own.values).float()
        return rows if own.scale is None else rows.mul_(F.embedding(ids, own.scale[:, None]))

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, precision={'bf16' if self.scale is None else 'int8'}"
