"""Add & norm of a post-norm transformer block: dropout, residual and LayerNorm in one pass."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from ..dropout import check_dropout
from . import reference
from .autograd import AddNorm

IMPLEMENTATIONS = ("reference", "native")


def add_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """LayerNorm(residual + dropout(x)) over the last dimension, with the dropout mask recomputed in the backward pass.

    Args:
        x, residual: (..., R), strided views allowed; x is cast to the dtype of residual.
        weight, bias: (R,); bias may be None.
        eps: added to the variance, positive.
        dropout_p: probability of dropping an entry of x, in [0, 1).
        seed: int, or 0-dim int64 tensor as `torch.randint(2**62, ())` draws it; needed where dropout_p > 0. The mask is
            that of `tlfast.ops.dropout`, the same in every implementation.
        impl: "auto", "reference" or "native" (C++, float32). A named one runs or raises, it never falls back.

    Returns:
        (..., R), in the dtype of residual. Gradients reach x, residual, weight and bias, once (no double backward,
        except with impl="reference").

    Cost, for M = rows R: the bytes of x and residual in, of y and the kept sum out (4 M) forward; dy and the sum in, dx
    and dresidual out (4 M; 3 M without dropout) backward. Kept for the backward pass: the sum, and two numbers a row.

    Raises:
        ValueError: shapes, dtypes, devices, eps, dropout_p or seed that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), sections 3.1 and 5.4; Ba, Kiros,
    Hinton, "Layer Normalization", 2016 (arXiv 1607.06450), equation 4.
    """
    _check(x, residual, weight, bias, eps)
    drawn = check_dropout(dropout_p, seed)
    x = x.to(residual.dtype)

    def refuses(name: str) -> str | None:
        if name == "native" and residual.dtype != torch.float32:
            return f"it takes a float32 residual, not {residual.dtype}; use impl='reference'"
        return None

    chosen = _dispatch.choose("add_norm", impl, IMPLEMENTATIONS, residual.device.type, refuses)
    if chosen == "reference":
        return reference.add_norm(x, residual, weight, bias, eps, dropout_p, drawn)
    return AddNorm.apply(x, residual, weight, bias, float(eps), float(dropout_p), drawn)


def _check(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> None:
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
