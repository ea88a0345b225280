"""The kernels of sum and norm as PyTorch operators, and their gradient."""

from __future__ import annotations

from typing import Any

import torch

from ..dropout import dropout
from . import native

torch.library.define(
    "tlfast::add_norm_fwd",
    "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, str norm, float dropout_p, Tensor? seed)"
    " -> (Tensor u, Tensor y, Tensor mean, Tensor rstd)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::add_norm_bwd",
    "(Tensor? du, Tensor dy, Tensor u, Tensor? mean, Tensor rstd, Tensor weight, float dropout_p, Tensor? seed,"
    " bool need_dbias) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("tlfast::add_norm_fwd", "cpu")
def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    u, y, mean, rstd = native.forward(x, residual, weight, bias, eps, norm, dropout_p, seed)
    # an operator cannot return None, nor one tensor twice: what is absent is an empty tensor
    return u, y, x.new_empty(0) if mean is None else mean, rstd


@torch.library.register_fake("tlfast::add_norm_fwd")
def _forward_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.shape[:-1].numel()
    mean = x.new_empty(0 if norm == "rms" else rows)
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, x.new_empty(rows)


@torch.library.impl("tlfast::add_norm_bwd", "cpu")
def _backward(
    du: torch.Tensor | None,
    dy: torch.Tensor,
    u: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dresidual, dweight, dbias = native.backward(du, dy, u, mean, rstd, weight, dropout_p, seed, need_dbias)
    absent = dy.new_empty(0)
    return absent if dx is None else dx, dresidual, dweight, absent.clone() if dbias is None else dbias


@torch.library.register_fake("tlfast::add_norm_bwd")
def _backward_fake(
    du: torch.Tensor | None,
    dy: torch.Tensor,
    u: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = u.new_empty(0) if seed is None else u.new_empty(u.shape)
    return dx, u.new_empty(u.shape), u.new_empty(weight.shape), u.new_empty(weight.shape if need_dbias else 0)


class SumAndNorm(torch.autograd.Function):
    """Keeps the sum u, each row's 1/deviation and, of a LayerNorm, its mean; the dropout mask is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        norm: str,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u, y, mean, rstd = torch.ops.tlfast.add_norm_fwd.default(x, residual, weight, bias, eps, norm, dropout_p, seed)
        ctx.save_for_backward(u, None if norm == "rms" else mean, rstd, weight, seed)
        ctx.dropout_p = dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)  # an output that nobody used has None for a gradient, no zeros to be read
        return u, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, du: torch.Tensor | None, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        u, mean, rstd, weight, seed = ctx.saved_tensors
        if dy is None:
            dx = du if du is None or seed is None else dropout(du, ctx.dropout_p, seed)
            return dx, du, None, None, None, None, None, None
        need_dbias = ctx.bias_dtype is not None
        dx, dresidual, dweight, dbias = torch.ops.tlfast.add_norm_bwd.default(
            du, dy, u, mean, rstd, weight, ctx.dropout_p, seed, need_dbias
        )
        return (
            dresidual if seed is None else dx,
            dresidual,
            dweight.to(weight.dtype),
            dbias.to(ctx.bias_dtype) if need_dbias else None,
            None,
            None,
            None,
            None,
        )
