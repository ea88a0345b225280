"""Frozen linear layers on the CPU: C++ (csrc/ops/cpu/matrix/linear.cpp and linear_fp32.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_rows
from .weight import FrozenWeight

# enum tl_activation and tl_weight_format in csrc/tlfast.h
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "relu": 3, "silu": 4, "none": 5}
_FORMATS = {"bf16": 0, "int8": 1, "nf4": 2, "int8_weight_only": 3}


def frozen_linear(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    rows = as_rows(x)
    y = torch.empty(*x.shape[:-1], weight.width, dtype=out_dtype, device="cpu")
    if weight.precision == "fp32":
        _native.library().linear_fp32_cpu(
            rows.data_ptr(),
            weight.values.data_ptr(),
            _native.pointer(weight.bias),
            y.data_ptr(),
            rows.shape[0],
            weight.inputs,
            weight.outputs,
            rows.stride(0),
            weight.values.stride(0),
            weight.width,
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
        return y
    _native.library().linear_cpu(
        rows.data_ptr(),
        weight.values.data_ptr(),
        _native.pointer(weight.scale),
        _native.pointer(weight.group_scale),
        _native.pointer(weight.smooth),
        _native.pointer(weight.bias),
        y.data_ptr(),
        rows.shape[0],
        weight.inputs,
        weight.outputs,
        rows.stride(0),
        weight.width,
        _native.dtype_code(x.dtype),
        _native.dtype_code(out_dtype),
        _FORMATS[weight.precision],
        _ACTIVATIONS[activation],
        weight.gated,
        torch.get_num_threads(),
    )
    return y
