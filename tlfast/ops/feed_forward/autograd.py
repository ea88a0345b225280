"""The kernels of a feed-forward as PyTorch operators, opaque to torch.compile, and their gradient."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from .weights import Weights

_WEIGHTS = (
    "Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, Tensor? gate_weight, Tensor? gate_bias"
)
torch.library.define(
    "tlfast::feed_forward_fwd",
    f"(Tensor x, {_WEIGHTS}, str activation) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::feed_forward_bwd",
    f"(Tensor dy, Tensor x, {_WEIGHTS}, str activation, bool need_dx, bool need_dweights)"
    " -> (Tensor dx, Tensor dup_weight, Tensor dup_bias, Tensor ddown_weight, Tensor ddown_bias,"
    " Tensor dgate_weight, Tensor dgate_bias)",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels() -> ModuleType:
    # imported on first use: Triton must not be imported before someone asks for it
    return importlib.import_module(".triton", __package__)


@torch.library.impl("tlfast::feed_forward_fwd", ("cpu", "cuda"))
def _forward(x: torch.Tensor, *weights_and_activation: Any) -> torch.Tensor:
    *weights, activation = weights_and_activation
    return kernels().forward(x, Weights(*weights), activation)


@torch.library.register_fake("tlfast::feed_forward_fwd")
def _forward_fake(x: torch.Tensor, *weights_and_activation: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.impl("tlfast::feed_forward_bwd", ("cpu", "cuda"))
def _backward(dy: torch.Tensor, x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    *weights, activation, need_dx, need_dweights = others
    grads = kernels().backward(dy, x, Weights(*weights), activation, need_dx, need_dweights)
    # an operator cannot return None: what was not wanted is an empty tensor
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


@torch.library.register_fake("tlfast::feed_forward_bwd")
def _backward_fake(dy: torch.Tensor, x: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    *weights, _activation, need_dx, need_dweights = others
    dx = dy.new_empty(dy.shape if need_dx else 0)
    return dx, *(
        dy.new_empty(0) if weight is None or not need_dweights else dy.new_empty(weight.shape, dtype=torch.float32)
        for weight in weights
    )


class FeedForward(torch.autograd.Function):
    """Keeps x and the weights, which exist anyway: what lies between the layers is computed once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, activation: str, *weights: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.activation = activation
        return torch.ops.tlfast.feed_forward_fwd.default(x, *weights, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        need_dx, _, *wanted = ctx.needs_input_grad
        dx, *grads = torch.ops.tlfast.feed_forward_bwd.default(dy, x, *weights, ctx.activation, need_dx, any(wanted))
        found = zip(wanted, grads, weights, strict=True)
        return dx if need_dx else None, None, *(grad.to(w.dtype) if needed else None for needed, grad, w in found)
