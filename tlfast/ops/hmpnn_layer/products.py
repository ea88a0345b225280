"""Dense products of the layer: as PyTorch has them, in the dtype given, with sums in float32."""

from __future__ import annotations

import torch


def times_transposed(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T, or out += x @ w.T in place; x (N, K) and w (M, K)."""
    if out is None:
        return torch.mm(x, w.t())
    return out.addmm_(x, w.t())


def transposed_times(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g.T @ x; g (N, M) and x (N, K)."""
    return torch.mm(g.t(), x)
