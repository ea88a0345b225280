"""How kernels see tensors: as rows of channels."""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x (..., width) as (rows, width) with neighbouring channels; copies only if strides forbid it."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    if x.dim() == 1:
        x = x.unsqueeze(0)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.flatten(0, -2)


def as_float32(x: torch.Tensor) -> torch.Tensor:
    """A small parameter (gate, bias) densely in float32; itself where it is that already."""
    return x.to(torch.float32).contiguous()


def empty_float32(*shape: int) -> torch.Tensor:
    """Room for what a native kernel writes, whatever PyTorch's default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")
