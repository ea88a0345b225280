"""Frozen linear layers on the CPU: C++ (csrc/ops/cpu/matrix/linear.cpp and linear_fp32.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_rows
from .._shared_weight import linear_fp32
from .codes import ACTIVATION_CODES, FORMAT_CODES
from .weight import FrozenWeight


def frozen_linear(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    rows = as_rows(x)
    y = torch.empty(*x.shape[:-1], weight.width, dtype=out_dtype, device="cpu")
    if weight.precision == "fp32":
        code = ACTIVATION_CODES[activation]
        linear_fp32(rows, [weight.values], weight.bias, y, weight.outputs, code, weight.gated)
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
        FORMAT_CODES[weight.precision],
        ACTIVATION_CODES[activation],
        weight.gated,
        torch.get_num_threads(),
    )
    return y
