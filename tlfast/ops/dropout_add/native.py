"""Dropout and sum on the CPU: C++ (csrc/ops/cpu/dropout_add.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_rows, empty_float32
from ..dropout import unsigned


def forward(x: torch.Tensor, residual: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    z = empty_float32(*x.shape)
    _native.library().dropout_add_forward_cpu(
        x_rows.data_ptr(),
        residual_rows.data_ptr(),
        z.data_ptr(),
        *x_rows.shape,
        x_rows.stride(0),
        residual_rows.stride(0),
        p,
        unsigned(seed),
        torch.get_num_threads(),
    )
    return z


def backward(dz: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    dz_rows = as_rows(dz)
    dx = empty_float32(*dz.shape)
    _native.library().dropout_add_backward_cpu(
        dz_rows.data_ptr(),
        dx.data_ptr(),
        *dz_rows.shape,
        dz_rows.stride(0),
        p,
        unsigned(seed),
        torch.get_num_threads(),
    )
    return dx
