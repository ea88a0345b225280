"""Residual sum and norm of a frozen block in one pass, and the norm's result in 8 bits where a product wants that."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _dispatch
from .._quantised import LARGEST, refusal
from . import reference
from .operator import kernels

IMPLEMENTATIONS = ("reference", "native", "triton")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TRITON_WIDTH = 16384


def norm_tap(
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    quantise: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Any, ...]:
    """total = x + residual and y = norm(total) * weight + bias over the last dimension; no graph is built.

    A pre-norm block's tap is total, a post-norm block's is y.

    Args:
        x, residual: (..., D) of one dtype: float32, bfloat16 or float16 (float64: reference alone); strided views
            allowed. residual may be None.
        weight, bias: (D,) in float32; either may be None.
        eps: added to the variance or mean square, positive.
        rms: False: LayerNorm, (total - mean) / sqrt(variance + eps). True: RMSNorm, total / sqrt(mean(total^2) + eps).
        quantise: None, torch.int8 or torch.float8_e4m3fn: y also as `tlfast.ops.quantise_rows` gives it, from before
            its rounding to the dtype of x.
        impl: "auto", "reference", "native" (C++, CPU; quantise: int8) or "triton" (GPU, D up to 16384; float8 from
            compute capability 8.9 on). A named one runs or raises, it never falls back.

    Returns:
        (total, y), both (..., D) in the dtype of x; (total, y, (values, scale)) where quantise is given. The sum is
        taken in float32 and rounded once; y comes from the unrounded sum. Without residual, total is x itself.

    Cost, in numbers of M = rows D: x and residual in, total and y out (4 M; 2 M without residual), each once: 8 M bytes
    in bfloat16, and with quantise M more. 8 flops a number.

    Raises:
        ValueError: shapes, dtypes, devices or eps that do not fit; an input requires a gradient; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv 1607.06450), equation 4; Zhang, Sennrich, "Root Mean
    Square Layer Normalization", 2019 (arXiv 1910.07467), equation 4; pre- and post-norm: Xiong et al. 2020 (arXiv
    2002.04745), table 1.
    """
    _check(x, residual, weight, bias, eps, quantise)

    def refuses(name: str) -> str | None:
        if name == "triton" and x.shape[-1] > _TRITON_WIDTH:
            return f"its programs hold a row, D up to {_TRITON_WIDTH}, not {x.shape[-1]}; use impl='reference'"
        return refusal(name, x, quantise)

    chosen = _dispatch.choose("norm_tap", impl, IMPLEMENTATIONS, x.device.type, refuses)
    arguments = (x, residual, weight, bias, float(eps), bool(rms), quantise)
    if chosen == "reference":
        total, y, quantised = reference.norm_tap(*arguments)
    elif _dispatch.runs_eagerly(x, residual, weight, bias):
        total, y, quantised = kernels(chosen).norm_tap(*arguments)
    else:
        total, y, *pair = torch.ops.tlfast.norm_tap.default(*arguments, chosen)
        quantised = tuple(pair)
    total = x if residual is None else total
    return (total, y) if quantise is None else (total, y, quantised)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    quantise: torch.dtype | None,
) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor in one of {_DTYPES}, not {given}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D >= 1, not {tuple(x.shape)}")
    if residual is not None:
        _check_like("residual", residual, x, x.shape, x.dtype)
    parameters = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight is not None:
        _check_like("weight", weight, x, x.shape[-1:], parameters)
    if bias is not None:
        _check_like("bias", bias, x, x.shape[-1:], parameters)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        raise ValueError(
            "x, residual, weight or bias requires a gradient, but norm_tap has none: call it under torch.no_grad()"
        )
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, not {eps}")
    if quantise is not None and quantise not in LARGEST:
        raise ValueError(f"quantise must be None or one of {tuple(LARGEST)}, not {quantise}")


def _check_like(name: str, tensor: torch.Tensor, x: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)} as x is {tuple(x.shape)}, not {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} with x in {x.dtype}, not {tensor.dtype}: use {name}.to({dtype})")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
