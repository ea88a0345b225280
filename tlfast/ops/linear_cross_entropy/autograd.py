"""The implementations that never hold all logits as a PyTorch operator, and its gradient.

The operator is opaque to torch.compile, which could otherwise keep the logits. It gives the gradient with the loss.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from ..frozen_linear import FrozenWeight
from .head import DENSE, Head

torch.library.define(
    "tlfast::linear_cross_entropy",
    "(Tensor hidden, Tensor labels, str precision, int outputs, int inputs, Tensor values, Tensor? weight_scale, "
    "Tensor? group_scale, Tensor? smooth, Tensor? bias, float scale, float? cap, int ignored, bool need_gradient, "
    "str impl) -> (Tensor loss, Tensor dhidden)",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    # imported on first use, as all implementations are
    return importlib.import_module(f".{impl}", __package__)


def operator_arguments(head: Head) -> tuple[Any, ...]:
    """A Head as the operator takes it."""
    weight = head.weight
    if isinstance(weight, FrozenWeight):
        stored = (weight.precision, weight.outputs, weight.inputs, weight.values)
        return (*stored, weight.scale, weight.group_scale, weight.smooth, head.bias, head.scale, head.cap)
    return (DENSE, *head.shape, weight, None, None, None, head.bias, head.scale, head.cap)


def _head(
    precision: str,
    outputs: int,
    inputs: int,
    values: torch.Tensor,
    weight_scale: torch.Tensor | None,
    group_scale: torch.Tensor | None,
    smooth: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    cap: float | None,
) -> Head:
    if precision == DENSE:
        return Head(values, bias, scale, cap)
    stored = FrozenWeight(precision, outputs, inputs, values, weight_scale, group_scale, smooth)
    return Head(stored, bias, scale, cap)


@torch.library.impl("tlfast::linear_cross_entropy", "CompositeExplicitAutograd")
def _forward(hidden: torch.Tensor, labels: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *head, ignored, need_gradient, impl = arguments
    with torch.autocast(hidden.device.type, enabled=False):  # the dtype of hidden is decided
        loss, gradient = kernels(impl).linear_cross_entropy(hidden, _head(*head), labels, ignored, need_gradient)
    # an operator cannot return None: what was not wanted is an empty tensor
    return loss, hidden.new_empty(0) if gradient is None else gradient


@torch.library.register_fake("tlfast::linear_cross_entropy")
def _forward_fake(hidden: torch.Tensor, labels: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    need_gradient = arguments[-2]
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, hidden.new_empty(hidden.shape if need_gradient else 0)


def loss_alone(hidden: torch.Tensor, labels: torch.Tensor, head: Head, ignored: int, impl: str) -> torch.Tensor:
    """Where nobody asks for the gradient."""
    arguments = operator_arguments(head)
    return torch.ops.tlfast.linear_cross_entropy.default(hidden, labels, *arguments, ignored, False, impl)[0]


class LinearCrossEntropy(torch.autograd.Function):
    """Keeps the gradient by hidden, as large as hidden, and no logits."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, ignored: int, impl: str) -> Any:
        loss, gradient = torch.ops.tlfast.linear_cross_entropy.default(
            hidden, labels, *operator_arguments(head), ignored, True, impl
        )
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * dloss).to(gradient.dtype), None, None, None, None
