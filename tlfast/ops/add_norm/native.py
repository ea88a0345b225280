"""Add & norm on the CPU: C++ (csrc/ops/cpu/add_norm.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from .._rows import as_float32, as_rows, empty_float32
from ..dropout import unsigned


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    norm: str,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The sum u, y, a row's mean (None with norm="rms", which the kernel takes from its absence) and 1/deviation."""
    x_rows, residual_rows, weight = as_rows(x), as_rows(residual), as_float32(weight)
    offset = None if bias is None else as_float32(bias)
    rows, width = x_rows.shape
    u, y, rstd = empty_float32(*x.shape), empty_float32(*x.shape), empty_float32(rows)
    mean = None if norm == "rms" else empty_float32(rows)
    _native.library().add_norm_forward_cpu(
        x_rows.data_ptr(),
        residual_rows.data_ptr(),
        weight.data_ptr(),
        _native.pointer(offset),
        u.data_ptr(),
        y.data_ptr(),
        _native.pointer(mean),
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
    return u, y, mean, rstd


def backward(
    du: torch.Tensor | None,
    dy: torch.Tensor,
    u: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dx (None where it equals dresidual), dresidual, dweight, dbias."""
    dy_rows, scale = as_rows(dy), as_float32(weight)
    stream = None if du is None else as_rows(du)
    rows, width = dy_rows.shape
    dx = None if seed is None else empty_float32(*u.shape)
    dresidual, dweight = empty_float32(*u.shape), empty_float32(width)
    dbias = empty_float32(width) if need_dbias else None
    _native.library().add_norm_backward_cpu(
        _native.pointer(stream),
        dy_rows.data_ptr(),
        u.data_ptr(),
        _native.pointer(mean),
        rstd.data_ptr(),
        scale.data_ptr(),
        _native.pointer(dx),
        dresidual.data_ptr(),
        dweight.data_ptr(),
        _native.pointer(dbias),
        rows,
        width,
        0 if stream is None else stream.stride(0),
        dy_rows.stride(0),
        dropout_p,
        unsigned(seed),
        torch.get_num_threads(),
    )
    return dx, dresidual, dweight, dbias
