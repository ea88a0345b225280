"""Sum and norm in one pass: the add & norm of a post-norm transformer block, and the pair that a pre-norm one needs."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from ..dropout import check_dropout
from . import native, reference
from .autograd import SumAndNorm

IMPLEMENTATIONS = ("reference", "native")

_NORMS = ("layer", "rms")


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    norm: str = "layer",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Norm of residual + dropout(x) over the last dimension, with the dropout mask recomputed in the backward pass.

    Args:
        x, residual: (..., R), strided views allowed; x is cast to the dtype of residual.
        weight, bias: (R,); bias may be None, and is with norm="rms".
        eps: added to the variance or mean square, positive.
        norm: of the sum u, "layer": (u - mean(u)) / sqrt(var(u) + eps) * weight + bias, or "rms":
            u / sqrt(mean(u^2) + eps) * weight.
        dropout_p: probability of dropping an entry of x, in [0, 1).
        seed: int, or 0-dim int64 tensor as `torch.randint(2**62, ())` draws it; needed where dropout_p > 0. The mask is
            that of `tlfast.ops.dropout`, the same in every implementation.
        impl: "auto", "reference" or "native" (C++, float32). A named one runs or raises, it never falls back.

    Returns:
        (..., R), in the dtype of residual. Gradients reach x, residual, weight and bias, once (no double backward,
        except with impl="reference").

    Cost, for M = rows R: the bytes of x and residual in, of y and the kept sum out (4 M) forward; dy and the sum in, dx
    and dresidual out (4 M; 3 M without dropout) backward. Kept for the backward pass: the sum, and two numbers a row
    (one with norm="rms").

    Raises:
        ValueError: shapes, dtypes, devices, eps, norm, dropout_p or seed that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), sections 3.1 and 5.4; Ba, Kiros,
    Hinton, "Layer Normalization", 2016 (arXiv 1607.06450), equation 4; Zhang, Sennrich, "Root Mean Square Layer
    Normalization", 2019 (arXiv 1910.07467), equation 4.
    """
    return _sum_and_norm("add_norm", x, residual, weight, bias, eps, norm, dropout_p, seed, impl)[1]


def prenorm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    norm: str = "layer",
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum u = residual + dropout(x) and norm(u): what a pre-norm block needs between two of its sub-layers.

    Args:
        As of `tlfast.ops.add_norm`.

    Returns:
        (u, y), both (..., R) in the dtype of residual: u goes on as the residual stream, y = norm(u) into the next
        sub-layer. Gradients of either or both reach x, residual, weight and bias, once (no double backward, except with
        impl="reference").

    Cost, for M = rows R: the bytes of x and residual in, of u and y out (4 M) forward; du, dy and u in, dx and
    dresidual out (5 M; 4 M without dropout) backward. Kept for the backward pass: u, which the caller holds anyway, and
    two numbers a row (one with norm="rms").

    Raises:
        ValueError: shapes, dtypes, devices, eps, norm, dropout_p or seed that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020 (arXiv 2002.04745), table 1;
    the norms as of `tlfast.ops.add_norm`.
    """
    return _sum_and_norm("prenorm", x, residual, weight, bias, eps, norm, dropout_p, seed, impl)


def _sum_and_norm(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    dropout_p: float,
    seed: int | torch.Tensor | None,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, residual, weight, bias, eps, norm)
    drawn = check_dropout(dropout_p, seed)
    x = x.to(residual.dtype)

    def refuses(name: str) -> str | None:
        if name == "native" and residual.dtype != torch.float32:
            return f"it takes a float32 residual, not {residual.dtype}; use impl='reference'"
        return None

    chosen = _dispatch.choose(op, impl, IMPLEMENTATIONS, residual.device.type, refuses)
    if chosen == "native" and _dispatch.runs_eagerly(x, residual, weight, bias):
        return native.forward(x, residual, weight, bias, float(eps), norm, float(dropout_p), drawn)[:2]
    run = reference.sum_and_norm if chosen == "reference" else SumAndNorm.apply
    return run(x, residual, weight, bias, float(eps), norm, float(dropout_p), drawn)


def _check(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, norm: str
) -> None:
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {_NORMS}, not {norm!r}")
    if norm == "rms" and bias is not None:
        raise ValueError("bias must be None with norm='rms', which has none: leave it out, or use norm='layer'")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a floating-point tensor, not {given}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., R) with R >= 1, not {tuple(x.shape)}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as x is, not {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be ({x.shape[-1]},) as x is {tuple(x.shape)}, not {tuple(tensor.shape)}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, not {eps}")
