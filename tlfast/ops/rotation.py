"""Rotary positions: each half of a head's channels turned against the other by its position's angles."""

from __future__ import annotations

from typing import Any

import torch

from ._dispatch import MISSING

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(first * cosines - second * sines, second * cosines + first * sines) of the halves of each head's channels.

    x (B, S, H, hd), of any strides; cosines and sines (B or 1, S, 1, hd), float32, the same in both halves; no gradient
    reaches them. Returns (B, S, H, hd) in the dtype of x, computed in float32 at least and rounded once. On a GPU it is
    one pass of Triton each way, elsewhere plain PyTorch.
    Source: Su et al. 2021, "RoFormer" (arXiv 2104.09864), section 3.2.
    """
    if x.is_cuda and x.dtype in _KERNEL_DTYPES and "triton" not in MISSING:
        return _Rotation.apply(x, cosines, sines)
    first, second = x.chunk(2, dim=-1)
    return (x * cosines + torch.cat((-second, first), dim=-1) * sines).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient is turned back; nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(x, cosines, sines)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(dy, cosines, sines, back=True), None, None


def _turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, back: bool = False) -> torch.Tensor:
    from .packed_attention.triton_rotate import rotate  # Triton must not be imported before someone asks for it

    rows = x.reshape(-1, *x.shape[-2:])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    cosines, sines = (table.reshape(-1, table.shape[-1]).contiguous() for table in (cosines, sines))
    return rotate(rows, cosines, sines, back).view(x.shape)
