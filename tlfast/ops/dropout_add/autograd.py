"""The kernels of dropout and sum as PyTorch operators, and their gradient."""

from __future__ import annotations

from typing import Any

import torch

from . import native

torch.library.define(
    "tlfast::dropout_add_fwd",
    "(Tensor x, Tensor residual, float p, Tensor seed) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::dropout_add_bwd", "(Tensor dz, float p, Tensor seed) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


@torch.library.impl("tlfast::dropout_add_fwd", "cpu")
def _forward(x: torch.Tensor, residual: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return native.forward(x, residual, p, seed)


@torch.library.register_fake("tlfast::dropout_add_fwd")
def _forward_fake(x: torch.Tensor, residual: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("tlfast::dropout_add_bwd", "cpu")
def _backward(dz: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return native.backward(dz, p, seed)


@torch.library.register_fake("tlfast::dropout_add_bwd")
def _backward_fake(dz: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    return dz.new_empty(dz.shape)


class DropoutAdd(torch.autograd.Function):
    """Keeps the seed alone; the gradient of residual is that of the sum itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        return torch.ops.tlfast.dropout_add_fwd.default(x, residual, p, seed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return torch.ops.tlfast.dropout_add_bwd.default(dz, ctx.p, seed), dz, None, None
