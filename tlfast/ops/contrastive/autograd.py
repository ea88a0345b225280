"""The kernels of the two reductions as PyTorch operators, and their gradients.

The operators are opaque to torch.compile, whose partitioner could otherwise keep the map. The implementation's name
travels with the call.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from .tiles import Pairs, Wanted

_GRADIENTS = "bool need_du, bool need_dv, str impl) -> (Tensor du, Tensor dv, Tensor dscale)"
torch.library.define(
    "tlfast::contrastive_softmax_fwd",
    "(Tensor u, Tensor v, Tensor scale, int offset, str impl) -> (Tensor rows, Tensor columns, Tensor own)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::contrastive_softmax_bwd",
    "(Tensor drows, Tensor dcolumns, Tensor down, Tensor u, Tensor v, Tensor scale, Tensor rows, Tensor columns,"
    f" int offset, {_GRADIENTS}",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::contrastive_sigmoid_fwd",
    "(Tensor u, Tensor v, Tensor scale, Tensor bias, int offset, str impl) -> (Tensor rows, Tensor slopes, Tensor own)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::contrastive_sigmoid_bwd",
    f"(Tensor drows, Tensor down, Tensor u, Tensor v, Tensor scale, Tensor bias, int offset, {_GRADIENTS}",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    # imported on first use: Triton must not be imported before someone asks for it
    return importlib.import_module(f".{impl}", __package__)


def accumulated_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of a dtype."""
    return torch.promote_types(dtype, torch.float32)


@torch.library.impl("tlfast::contrastive_softmax_fwd", "CompositeExplicitAutograd")
def _softmax_forward(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):  # the inputs' dtype is decided, and so is that of the sums
        return kernels(impl).softmax_forward(Pairs(u, v, scale, offset))


@torch.library.register_fake("tlfast::contrastive_softmax_fwd")
def _softmax_forward_fake(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = accumulated_in(u.dtype)
    rows, own = (u.new_empty(u.shape[:1], dtype=wide) for _ in range(2))
    return rows, v.new_empty(v.shape[:1], dtype=wide), own


@torch.library.impl("tlfast::contrastive_softmax_bwd", "CompositeExplicitAutograd")
def _softmax_backward(
    drows: torch.Tensor,
    dcolumns: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        wanted = Wanted(drows, down, need_du, need_dv)
        found = kernels(impl).softmax_backward(Pairs(u, v, scale, offset), wanted, dcolumns, rows, columns)
    return _as_outputs(u, v, scale, *found)


@torch.library.register_fake("tlfast::contrastive_softmax_bwd")
def _softmax_backward_fake(
    drows: torch.Tensor,
    dcolumns: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake_outputs(u, v, scale, need_du, need_dv)


@torch.library.impl("tlfast::contrastive_sigmoid_fwd", "CompositeExplicitAutograd")
def _sigmoid_forward(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        return kernels(impl).sigmoid_forward(Pairs(u, v, scale, offset), bias)


@torch.library.register_fake("tlfast::contrastive_sigmoid_fwd")
def _sigmoid_forward_fake(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int, impl: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, slopes, own = (u.new_empty(u.shape[:1], dtype=accumulated_in(u.dtype)) for _ in range(3))
    return rows, slopes, own


@torch.library.impl("tlfast::contrastive_sigmoid_bwd", "CompositeExplicitAutograd")
def _sigmoid_backward(
    drows: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        wanted = Wanted(drows, down, need_du, need_dv)
        found = kernels(impl).sigmoid_backward(Pairs(u, v, scale, offset), bias, wanted)
    return _as_outputs(u, v, scale, *found)


@torch.library.register_fake("tlfast::contrastive_sigmoid_bwd")
def _sigmoid_backward_fake(
    drows: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _fake_outputs(u, v, scale, need_du, need_dv)


def _as_outputs(
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    du: torch.Tensor | None,
    dv: torch.Tensor | None,
    dscale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An operator cannot return None: a gradient that was not wanted is an empty tensor."""
    return (
        u.new_empty(0) if du is None else du.to(u.dtype),
        v.new_empty(0) if dv is None else dv.to(v.dtype),
        dscale.to(scale.dtype),
    )


def _fake_outputs(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, need_du: bool, need_dv: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    du, dv = u.new_empty(u.shape if need_du else 0), v.new_empty(v.shape if need_dv else 0)
    return du, dv, scale.new_empty(())


class Softmax(torch.autograd.Function):
    """Keeps u, v and scale as given, and a number a row and a column: no map."""

    @staticmethod
    def forward(
        ctx: Any, u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int, impl: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, columns, own = torch.ops.tlfast.contrastive_softmax_fwd.default(u, v, scale, offset, impl)
        ctx.save_for_backward(u, v, scale, rows, columns)
        ctx.offset, ctx.impl = offset, impl
        return rows, columns, own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, drows: torch.Tensor, dcolumns: torch.Tensor, down: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        need_du, need_dv, need_dscale = ctx.needs_input_grad[:3]
        du, dv, dscale = torch.ops.tlfast.contrastive_softmax_bwd.default(
            drows, dcolumns, down, *ctx.saved_tensors, ctx.offset, need_du or not need_dv, need_dv, ctx.impl
        )
        return du if need_du else None, dv if need_dv else None, dscale if need_dscale else None, None, None


class Sigmoid(torch.autograd.Function):
    """Keeps u, v, scale and bias as given, and a number a row: no map."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        v: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        offset: int,
        impl: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, slopes, own = torch.ops.tlfast.contrastive_sigmoid_fwd.default(u, v, scale, bias, offset, impl)
        ctx.save_for_backward(u, v, scale, bias, slopes)
        ctx.offset, ctx.impl = offset, impl
        return rows, own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, drows: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, slopes = ctx.saved_tensors
        need_du, need_dv, need_dscale, need_dbias = ctx.needs_input_grad[:4]
        du = dv = dscale = None
        if need_du or need_dv or need_dscale:
            du, dv, dscale = torch.ops.tlfast.contrastive_sigmoid_bwd.default(
                drows, down, *inputs, ctx.offset, need_du or not need_dv, need_dv, ctx.impl
            )
        dbias = (drows * slopes).sum().to(inputs[3].dtype) if need_dbias else None
        found = du if need_du else None, dv if need_dv else None, dscale if need_dscale else None
        return *found, dbias, None, None
