"""Rows of activations in 8 bits with a scale each: what an 8-bit product takes for its first operand."""

from __future__ import annotations

import torch

from .. import _dispatch
from .._quantised import LARGEST, refusal
from . import reference
from .operator import kernels

IMPLEMENTATIONS = ("reference", "native", "triton")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantise_rows(
    x: torch.Tensor, smooth: torch.Tensor | None = None, dtype: torch.dtype = torch.int8, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x * smooth in 8 bits: scale = max |x * smooth| / 127, values = round(x * smooth / scale).

    Args:
        x: (..., D) in float32, bfloat16 or float16 (float64: reference alone); strided views allowed. No gradient.
        smooth: (D,) float32 or None: moves magnitude between columns of x and the rows of a weight.
        dtype: of the values: torch.int8, rounded to nearest even, or torch.float8_e4m3fn, with 448 in the place of 127;
            no number exceeds the largest one, so nothing is left to saturate.
        impl: "auto", "reference", "native" (C++, CPU, int8) or "triton" (GPU; float8 from compute capability 8.9 on).
            A named one runs or raises, it never falls back.

    Returns:
        values (..., D) in `dtype`, contiguous, and scale (...) in float32 (float64 for float64): values * scale is near
        x * smooth. A row of zeros, or of numbers too small for a normal scale, has scale 0 and values 0; one that holds
        NaN or infinity has that for its scale and values 0. Rows do not affect each other.

    Cost: the bytes of x in, 1 byte a number and 4 a row out: 3 D + 4 a row in bfloat16; 2 flops a number.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an input requires a gradient; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Yao et al., "ZeroQuant", NeurIPS 2022 (arXiv 2206.01861), token-wise quantisation; smooth: Xiao et al.,
    "SmoothQuant", ICML 2023 (arXiv 2211.10438), equation 3; float8: Micikevicius et al. 2022 (arXiv 2209.05433).
    """
    _check(x, smooth, dtype)
    chosen = _dispatch.choose(
        "quantise_rows", impl, IMPLEMENTATIONS, x.device.type, lambda name: refusal(name, x, dtype)
    )
    if chosen == "reference":
        return reference.quantise_rows(x, smooth, dtype)
    if _dispatch.runs_eagerly(x, smooth):
        return kernels(chosen).quantise_rows(x, smooth, dtype)
    return torch.ops.tlfast.quantise_rows.default(x, smooth, dtype, chosen)


def _check(x: torch.Tensor, smooth: torch.Tensor | None, dtype: torch.dtype) -> None:
    if dtype not in LARGEST:
        raise ValueError(f"dtype must be one of {tuple(LARGEST)}, not {dtype}")
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor in one of {_DTYPES}, not {given}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D >= 1, not {tuple(x.shape)}")
    if smooth is not None:
        allowed = torch.float64 if x.dtype == torch.float64 else torch.float32
        if smooth.dtype not in (torch.float32, allowed):
            raise ValueError(f"smooth must be torch.float32, not {smooth.dtype}: use smooth.float()")
        if smooth.shape != x.shape[-1:]:
            raise ValueError(f"smooth must be ({x.shape[-1]},) as x is {tuple(x.shape)}, not {tuple(smooth.shape)}")
        if smooth.device != x.device:
            raise ValueError(f"smooth is on {smooth.device} and x on {x.device}: move them to one device")
    if torch.is_grad_enabled() and (x.requires_grad or (smooth is not None and smooth.requires_grad)):
        raise ValueError("x or smooth requires a gradient, but quantise_rows has none: call it under torch.no_grad()")
