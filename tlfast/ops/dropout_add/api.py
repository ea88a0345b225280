"""Dropout and residual sum in one pass: the end of a pre-norm block."""

from __future__ import annotations

import torch

from .. import _dispatch
from ..dropout import check_dropout
from . import reference
from .autograd import DropoutAdd

IMPLEMENTATIONS = ("reference", "native")


def dropout_add(
    x: torch.Tensor, residual: torch.Tensor, p: float, seed: int | torch.Tensor | None, impl: str = "auto"
) -> torch.Tensor:
    """residual + dropout(x), with the dropout mask recomputed in the backward pass; a plain sum where p is 0.

    Args:
        x, residual: (..., C), strided views allowed; x is cast to the dtype of residual.
        p: probability of dropping an entry of x, in [0, 1).
        seed: int, or 0-dim int64 tensor as `torch.randint(2**62, ())` draws it; may be None where p is 0. The mask is
            that of `tlfast.ops.dropout`, the same in every implementation.
        impl: "auto", "reference" or "native" (C++, float32). A named one runs or raises, it never falls back.

    Returns:
        (..., C), in the dtype of residual. Gradients reach x and residual, once where p > 0 (no double backward, except
        with impl="reference").

    Cost, for M entries: x and residual in, the sum out (3 M) forward; dz in, dx out (2 M) backward, as dresidual is dz
    itself. Kept for the backward pass: the seed.

    Raises:
        ValueError: shapes, dtypes, devices, p or seed that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", 2014; in a residual
    block: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), section 5.4.
    """
    _check(x, residual)
    drawn = check_dropout(p, seed)
    x = x.to(residual.dtype)

    def refuses(name: str) -> str | None:
        if name == "native" and residual.dtype != torch.float32:
            return f"it takes a float32 residual, not {residual.dtype}; use impl='reference'"
        return None

    chosen = _dispatch.choose("dropout_add", impl, IMPLEMENTATIONS, residual.device.type, refuses)
    if drawn is None:
        return residual + x
    run = reference.dropout_add if chosen == "reference" else DropoutAdd.apply
    return run(x, residual, float(p), drawn)


def _check(x: torch.Tensor, residual: torch.Tensor) -> None:
    for name, tensor in (("x", x), ("residual", residual)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a floating-point tensor, not {given}")
    if residual.device != x.device:
        raise ValueError(f"residual is on {residual.device} and x on {x.device}: move them to one device")
    if x.dim() == 0:
        raise ValueError("x must be (..., C), not ()")
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as x is, not {tuple(residual.shape)}")
