"""Add & norm on the CPU: C++ (csrc/ops/cpu/add_norm.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_float32, as_rows
from ..dropout import unsigned


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x_rows, residual_rows, weight = as_rows(x), as_rows(residual), as_float32(weight)
    offset = None if bias is None else as_float32(bias)
    rows, width = x_rows.shape
    y, u = torch.empty(x.shape), torch.empty(x.shape)
    mean, rstd = torch.empty(rows), torch.empty(rows)
    _native.library().add_norm_forward_cpu(
        x_rows.data_ptr(),
        residual_rows.data_ptr(),
        weight.data_ptr(),
        _native.pointer(offset),
        u.data_ptr(),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        rows,
        width,
        x_rows.stride(0),
        residual_rows.stride(0),
        eps,
        dropout_p,
        unsigned(seed),
        torch.get_num_threads(),
    )
    return y, u, mean, rstd


def backward(
    dy: torch.Tensor,
    u: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx (None where it equals dresidual), dresidual, dweight, dbias."""
    dy_rows, scale = as_rows(dy), as_float32(weight)
    rows, width = dy_rows.shape
    dx = None if seed is None else torch.empty(u.shape)
    dresidual, dweight = torch.empty(u.shape), torch.empty(width)
    dbias = torch.empty(width) if need_dbias else None
    _native.library().add_norm_backward_cpu(
        dy_rows.data_ptr(),
        u.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        scale.data_ptr(),
        _native.pointer(dx),
        dresidual.data_ptr(),
        dweight.data_ptr(),
        _native.pointer(dbias),
        rows,
        width,
        dy_rows.stride(0),
        dropout_p,
        unsigned(seed),
        torch.get_num_threads(),
    )
    return dx, dresidual, dweight, dbias
