"""The kernels of attention as PyTorch operators, and their gradient.

The operators are opaque to torch.compile, whose partitioner could otherwise decide to keep the attention map. The
implementation's name travels with the call.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

_SETTINGS = "bool causal, float scale, float dropout_p, Tensor? seed"
torch.library.define(
    "tlfast::attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_mask, {_SETTINGS}, str impl)"
    " -> (Tensor out, Tensor statistics)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::attention_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_mask, Tensor out, Tensor statistics,"
    f" {_SETTINGS}, bool need_dbias, str impl) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    return importlib.import_module(f".{impl}", __package__)


@torch.library.impl("tlfast::attention_fwd", "CompositeExplicitAutograd")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # the inputs' dtype is decided, and so is that of the sums
        return kernels(impl).forward(q, k, v, bias, key_mask, causal, scale, dropout_p, seed)


@torch.library.register_fake("tlfast::attention_fwd")
def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries, 2), dtype=accumulated_in(q.dtype))


@torch.library.impl("tlfast::attention_bwd", "CompositeExplicitAutograd")
def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv, dbias = kernels(impl).backward(
            dout, q, k, v, bias, key_mask, out, statistics, causal, scale, dropout_p, seed, need_dbias
        )
    # an operator cannot return None: a gradient that was not wanted is an empty tensor
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


@torch.library.register_fake("tlfast::attention_bwd")
def _backward_fake(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and need_dbias else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of a dtype."""
    return torch.promote_types(dtype, torch.float32)


class Attention(torch.autograd.Function):
    """Keeps q, k, v, bias and key_mask as given, the output, and two numbers a row, (B, H, Sq, 2): no map."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: torch.Tensor | None,
        impl: str,
    ) -> torch.Tensor:
        out, statistics = torch.ops.tlfast.attention_fwd.default(
            q, k, v, bias, key_mask, causal, scale, dropout_p, seed, impl
        )
        ctx.save_for_backward(q, k, v, bias, key_mask, out, statistics, seed)
        ctx.settings = (causal, scale, dropout_p)
        ctx.impl = impl
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, bias, key_mask, out, statistics, seed = ctx.saved_tensors
        need_dbias = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = torch.ops.tlfast.attention_bwd.default(
            dout, q, k, v, bias, key_mask, out, statistics, *ctx.settings, seed, need_dbias, ctx.impl
        )
        return dq, dk, dv, dbias if need_dbias else None, *([None] * 6)
