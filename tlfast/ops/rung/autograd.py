"""The kernels of a rung as PyTorch operators, and their gradient.

The operators are opaque to torch.compile; the implementation's name travels with the call.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

torch.library.define(
    "tlfast::rung_fwd",
    "(Tensor h, Tensor s, Tensor weight, Tensor? bias, Tensor alpha, float temperature, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::rung_bwd",
    "(Tensor dz, Tensor? h, Tensor? s, Tensor? z, Tensor alpha, float temperature, bool need_ds, bool need_dbias,"
    " str impl) -> (Tensor ds, Tensor dweight, Tensor dbias, Tensor dalpha)",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    # imported on first use: Triton must not be imported before someone asks for it
    return importlib.import_module(f".{impl}", __package__)


@torch.library.impl("tlfast::rung_fwd", ("cpu", "cuda"))
def _forward(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
    impl: str,
) -> torch.Tensor:
    return kernels(impl).forward(h, s, weight, bias, alpha, temperature)


@torch.library.register_fake("tlfast::rung_fwd")
def _forward_fake(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
    impl: str,
) -> torch.Tensor:
    return s.new_empty(s.shape)


@torch.library.impl("tlfast::rung_bwd", ("cpu", "cuda"))
def _backward(
    dz: torch.Tensor,
    h: torch.Tensor | None,
    s: torch.Tensor | None,
    z: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
    need_ds: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, ...]:
    grads = kernels(impl).backward(dz, h, s, z, alpha, temperature, need_ds, need_dbias)
    # an operator cannot return None: what was not wanted is an empty tensor
    return tuple(dz.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("tlfast::rung_bwd")
def _backward_fake(
    dz: torch.Tensor,
    h: torch.Tensor | None,
    s: torch.Tensor | None,
    z: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
    need_ds: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[torch.Tensor, ...]:
    width = dz.shape[-1]
    absent = dz.new_empty(0)
    return (
        dz.new_empty(dz.shape) if need_ds else absent,
        absent.clone() if h is None else dz.new_empty((width, h.shape[-1]), dtype=torch.float32),
        dz.new_empty((width,), dtype=torch.float32) if need_dbias else absent.clone(),
        absent.clone() if s is None else dz.new_empty(alpha.shape, dtype=torch.float32),
    )


class Rung(torch.autograd.Function):
    """Keeps h, s and z for the backward pass: all three exist anyway, so a rung saves no storage of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        s: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        alpha: torch.Tensor,
        temperature: float,
        impl: str,
    ) -> torch.Tensor:
        z = torch.ops.tlfast.rung_fwd.default(h, s, weight, bias, alpha, temperature, impl)
        _, need_ds, need_dweight, need_dbias, need_dalpha, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            h if need_dweight else None, s if need_dalpha else None, z if need_dalpha else None, alpha
        )
        ctx.wanted = (need_ds, need_dweight, need_dbias, need_dalpha)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.temperature, ctx.impl = temperature, impl
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, s, z, alpha = ctx.saved_tensors
        need_ds, need_dweight, need_dbias, need_dalpha = ctx.wanted
        ds, dweight, dbias, dalpha = torch.ops.tlfast.rung_bwd.default(
            dz, h, s, z, alpha, ctx.temperature, need_ds, need_dbias, ctx.impl
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None,
            ds if need_ds else None,
            dweight.to(weight_dtype) if need_dweight else None,
            dbias.to(bias_dtype) if need_dbias else None,
            dalpha.to(alpha.dtype) if need_dalpha else None,
            None,
            None,
        )
