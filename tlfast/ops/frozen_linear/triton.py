"""Frozen linear layers on the GPU: Triton's kernels, and PyTorch's product where no bit is stored differently.

"bf16" is PyTorch's own product (cuBLAS), which rounds its sums to bfloat16, and one pass behind it where there is an
activation or a gate. All others are one kernel each: scales, bias, activation and gates in its epilogue.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import _dispatch
from .._rows import as_operand, as_rows
from ..quantise_rows import quantise_rows
from .triton_activate import finished
from .triton_quantised import fp8_linear, int8_linear
from .triton_unpacked import int8_weight_linear, nf4_linear
from .weight import FrozenWeight

# Triton's interpreter has no bfloat16: there the product sees numbers of bfloat16 in float32
_PRODUCT = torch.float32 if _dispatch.TRITON_INTERPRETED else torch.bfloat16


def frozen_linear(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    y = _RUN[weight.precision](as_rows(x), weight, activation, out_dtype)
    return y.view(*x.shape[:-1], weight.width)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(_PRODUCT)


def _bf16(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    x, matrix = as_operand(_rounded(x)), weight.values[: weight.outputs, : weight.inputs].to(_PRODUCT)
    bias = None if weight.bias is None else weight.bias[: weight.outputs]
    if activation == "none" and not weight.gated and out_dtype == _PRODUCT:
        return F.linear(x, matrix, None if bias is None else bias.to(_PRODUCT))
    return finished(F.linear(x, matrix), bias, activation, out_dtype, weight.gated)


def _int8(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    values, scale = quantise_rows(x, weight.smooth)
    return int8_linear(values, scale, *_layer(weight), activation, out_dtype, weight.gated)


def _fp8(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    values, scale = quantise_rows(x, None, torch.float8_e4m3fn)
    return fp8_linear(values, scale, *_layer(weight), activation, out_dtype, weight.gated)


def _int8_weight_only(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    return int8_weight_linear(_rounded(x), *_layer(weight), activation, out_dtype, weight.gated)


def _nf4(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    codes, scale, bias = _layer(weight)
    assert weight.group_scale is not None
    return nf4_linear(_rounded(x), codes, weight.group_scale, scale, bias, activation, out_dtype, weight.gated)


def _layer(weight: FrozenWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Values, scales and bias of the outputs, without what fills up a panel."""
    assert weight.scale is not None
    outputs = weight.outputs
    bias = None if weight.bias is None else weight.bias[:outputs]
    return weight.values[:outputs], weight.scale[:outputs], bias


_RUN: dict[str, Callable[..., torch.Tensor]] = {
    "bf16": _bf16,
    "int8": _int8,
    "fp8": _fp8,
    "int8_weight_only": _int8_weight_only,
    "nf4": _nf4,
}
