"""How kernels see tensors: as rows of channels."""

from __future__ import annotations

import torch

_LARGEST_OFFSET = 2**31 - 1


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View x (..., width) as (rows, width) with neighbouring channels; copies only if strides forbid it."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    if x.dim() == 1:
        x = x.unsqueeze(0)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.flatten(0, -2)


def as_operand(x: torch.Tensor) -> torch.Tensor:
    """The rows of x (..., width) for PyTorch's product on a GPU, copied where they lie too far apart for it.

    cuBLAS takes a row stride of 64 bits, but kernels of its place rows by 32-bit offsets: of a view of (3, 64) with a
    stride of 2^30 an H200 read where nothing is, and no CUDA call of the process worked any more.
    """
    rows = as_rows(x)
    return rows.contiguous() if rows.shape[0] * rows.stride(0) > _LARGEST_OFFSET else rows


def as_float32(x: torch.Tensor) -> torch.Tensor:
    """A small parameter (gate, bias) densely in float32; itself where it is that already."""
    return x.to(torch.float32).contiguous()


def empty_float32(*shape: int) -> torch.Tensor:
    """Room for what a native kernel writes, whatever PyTorch's default dtype and device are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")
