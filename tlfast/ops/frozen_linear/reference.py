"""The formula of a frozen linear layer in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._activations import ACTIVATIONS
from ..quantise_rows import quantise_rows
from .weight import FrozenWeight

ACTIVATE = {"none": lambda x: x, **ACTIVATIONS}


def frozen_linear(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    inputs = x.float()
    if weight.precision in ("bf16", "nf4", "int8_weight_only"):
        inputs = inputs.bfloat16().float()
    matrix = weight.value()
    if weight.precision == "nf4":
        matrix = matrix.bfloat16().float()
    if weight.precision in ("int8", "fp8"):
        dtype = torch.int8 if weight.precision == "int8" else torch.float8_e4m3fn
        values, scale = quantise_rows(inputs, weight.smooth, dtype, impl="reference")
        inputs = values.float() * scale[..., None]
        if weight.smooth is not None:
            inputs = inputs / weight.smooth
    y = F.linear(inputs, matrix, weight.bias_value())
    if not weight.gated:
        return ACTIVATE[activation](y).to(out_dtype)
    gate, up = y.chunk(2, dim=-1)
    return (ACTIVATE[activation](gate) * up).to(out_dtype)
