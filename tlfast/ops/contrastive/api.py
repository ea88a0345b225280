"""Reductions of all pairs' scores, tau u_i . v_j, that contrastive losses are made of, without the map of scores."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from . import reference
from .autograd import Sigmoid, Softmax, accumulated_in

IMPLEMENTATIONS = ("reference", "recompute", "native", "triton")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def contrastive_softmax(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor | float, offset: int = 0, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-sum-exp of s_ij = scale u_i . v_j over each row's and each column's other pairs, and the own pairs' scores.

    Row i and column i + offset belong together. With (rows, columns, own) = contrastive_softmax(u, v, scale) the
    cross-entropy of row i's own pair is softplus(rows_i - own_i), to the last digits also where it is near 0, and
    the log-sum-exp of the whole row is logaddexp(rows_i, own_i); the same for columns.

    Args:
        u, v: (N, D) and (M, D) of one dtype: float32, bfloat16 or float16; float64 runs on "reference" and "recompute".
        scale: tau, a number or a tensor of one element, not negative; dimensionless.
        offset: column of row 0's own pair; offset + N <= M.
        impl: "auto", "reference" (plain PyTorch, holds the map), "recompute" (plain PyTorch, a part at a time),
            "native" (C++, CPU) or "triton" (GPU). A named one runs or raises, it never falls back.

    Returns:
        rows (N,), columns (M,), own (N,), in float32 (float64 for float64), where products are accumulated, too. -inf
        where a row or column has no other pair. Gradients reach u, v and scale, once ("reference": any number of
        times).

    Cost: 2 N M D flops forward, 6 N M D backward (4 where only one of u and v needs a gradient): the scores are made
    anew, once for both products. Beyond inputs and gradients one tile of scores, and O(N + M) numbers kept. The least
    bytes are those of u, v and their gradients.

    Raises:
        ValueError: shapes, dtypes, devices, scale or offset that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018 (arXiv
    1807.03748), equation 4; running maximum: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018
    (arXiv 1805.02867), algorithm 3.
    """
    scale = _check(u, v, scale, offset)
    chosen = _choose("contrastive_softmax", u, impl)
    if chosen == "reference":
        return reference.softmax(u, v, scale, offset)
    return Softmax.apply(u, v, scale, offset, chosen)


def contrastive_sigmoid(
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    offset: int = 0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of softplus(s_ij + bias), s_ij = scale u_i . v_j, over each row's other pairs, and the own pairs' scores.

    SigLIP's loss is (sum(rows) + sum(softplus(-own - bias))) / N of (rows, own).

    Args:
        u, v, scale, offset, impl: as for `contrastive_softmax`.
        bias: a number or a tensor of one element; dimensionless.

    Returns:
        rows (N,), own (N,) without bias, in float32 (float64 for float64). Gradients reach u, v, scale and bias.

    Cost: as for `contrastive_softmax`.

    Raises:
        ValueError: shapes, dtypes, devices, scale, bias or offset that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid Loss for Language Image Pre-Training", ICCV 2023 (arXiv
    2303.15343), algorithm 1.
    """
    scale = _check(u, v, scale, offset)
    bias, _ = _number("bias", bias, u)
    chosen = _choose("contrastive_sigmoid", u, impl)
    if chosen == "reference":
        return reference.sigmoid(u, v, scale, bias, offset)
    return Sigmoid.apply(u, v, scale, bias, offset, chosen)


def _choose(op: str, u: torch.Tensor, impl: str) -> str:
    def refuses(name: str) -> str | None:
        if name in ("reference", "recompute"):
            return None
        if u.dtype not in _KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {u.dtype}; use impl='recompute'"
        return _dispatch.interpreter_refuses(u.dtype) if name == "triton" else None

    return _dispatch.choose(op, impl, IMPLEMENTATIONS, u.device.type, refuses)


def _check(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor | float, offset: int) -> torch.Tensor:
    """The scale as a tensor of the dtype that is computed in."""
    for name, x in (("u", u), ("v", v)):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a floating-point tensor, not {given}")
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(f"{name} must be a matrix of embeddings, (rows, D) with D >= 1, not {tuple(x.shape)}")
    if v.dtype != u.dtype:
        raise ValueError(f"v must have the dtype of u, {u.dtype}, not {v.dtype}: cast one of them")
    if v.device != u.device:
        raise ValueError(f"v is on {v.device} and u on {u.device}: move them to one device")
    if v.shape[1] != u.shape[1]:
        raise ValueError(f"v must be (M, {u.shape[1]}) as u is {tuple(u.shape)}, not {tuple(v.shape)}")
    if not 0 <= offset <= v.shape[0] - u.shape[0]:
        raise ValueError(
            f"offset must be in [0, M - N] so that every row has its own column, not {offset} with u "
            f"{tuple(u.shape)} and v {tuple(v.shape)}"
        )
    number, value = _number("scale", scale, u)
    if value is not None and value < 0:
        raise ValueError(f"scale must not be negative: it is tau itself, not its logarithm; got {value}")
    return number


def _number(name: str, given: torch.Tensor | float, u: torch.Tensor) -> tuple[torch.Tensor, float | None]:
    """A number as a tensor () beside u, and its value where that can be read without waiting for a GPU."""
    wide = accumulated_in(u.dtype)
    value = None
    if isinstance(given, torch.Tensor):
        if given.numel() != 1 or not given.is_floating_point():
            what = f"{tuple(given.shape)} of {given.dtype}"
            raise ValueError(f"{name} must be a number or a floating-point tensor of one element, not {what}")
        if given.device != u.device and given.device.type != "cpu":
            raise ValueError(f"{name} is on {given.device} and u on {u.device}: move them to one device")
        number = given.reshape(()).to(dtype=wide, device=u.device)
        if given.device.type == "cpu" and not torch.compiler.is_compiling():
            value = float(given.detach())
    else:
        value = float(given)
        number = torch.full((), value, dtype=wide, device=u.device)
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return number, value
