"""Inputs of add_norm and prenorm, their formula in PyTorch, and the comparison of both within an error budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tlfast import _native
from tlfast.ops import add_norm, dropout

from ..budget import assert_within_budget

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
IMPLS = ["reference", pytest.param("native", marks=needs_native)]
SHAPES = [(1, 1), (2, 63, 96), (65, 100), (3, 5, 7, 48), (7,), (300, 33), (5, 4096)]
NORMS = ["layer", "layer without bias", "rms"]
EPS = 1e-12  # BERT's


class Case:
    """x, residual, weight and, for "layer", bias; the gradients of u and y: float32 numbers as float64."""

    def __init__(self, shape: tuple[int, ...], norm: str = "layer", offset: float = 0.0) -> None:
        torch.manual_seed(0)
        x, residual, dy = (torch.randn(shape) for _ in range(3))
        weight, bias, du = torch.randn(shape[-1]), torch.randn(shape[-1]), torch.randn(shape)
        self.norm = norm.split()[0]
        inputs = [x, residual + offset, weight, bias] if norm == "layer" else [x, residual + offset, weight]
        self.inputs = [t.double() for t in inputs]
        self.gradients = {"u": du.double(), "y": dy.double()}

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return [t.to(dtype, copy=True).requires_grad_() for t in self.inputs]


def formula(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    norm: str,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """u and y."""
    u = residual + dropout(x, dropout_p, seed)
    if norm == "layer":
        return u, F.layer_norm(u, weight.shape, weight, bias, eps)
    return u, u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight


def only_y(*args, **options) -> tuple[None, torch.Tensor]:
    """add_norm as a function that returns what prenorm does, but for the sum, which it keeps to itself."""
    return None, add_norm(*args, **options)


def results(function: Callable, case: Case, dtype: torch.dtype, used: str, **options) -> dict[str, torch.Tensor | None]:
    """The outputs that `used` names ("u", "y" or "uy") and the gradients through them, None where they do not reach."""
    leaves = case.leaves(dtype)
    outputs = dict(zip("uy", function(*leaves, norm=case.norm, **options), strict=True))
    found = torch.autograd.grad(
        [outputs[name] for name in used], leaves, [case.gradients[name].to(dtype) for name in used], allow_unused=True
    )
    gradients = dict(zip(("dx", "dresidual", "dweight", "dbias"), found, strict=False))
    return {name: outputs[name].detach() for name in used} | gradients


def check(function: Callable, case: Case, used: str, impl: str, **options) -> None:
    """The shared budget, plus one rounding of the case's largest number: a result can be exact in PyTorch by luck."""
    exact = results(formula, case, torch.float64, used, **options)
    peer = results(formula, case, torch.float32, used, **options)
    ours = results(function, case, torch.float32, used, impl=impl, **options)
    numbers = [*case.inputs, *(case.gradients[name] for name in used), *(t for t in exact.values() if t is not None)]
    rounding = torch.finfo(torch.float32).eps * max(float(t.abs().max()) for t in numbers)
    for name, expected in exact.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert_within_budget(name, ours[name], peer[name], expected, rounding)
