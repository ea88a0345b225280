"""A rung on the CPU: its products by the faster route (_gemm.py), csrc/ops/cpu/rung.cpp for what is bound by memory."""

from __future__ import annotations

import torch

from ... import _native
from .._gemm import linear
from .._rows import as_float32, as_rows


def forward(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    p = linear(as_rows(h), weight.to(h.dtype))  # (rows, R)
    s_rows = as_rows(s)
    # the blend overwrites the product where it may: one buffer fewer
    z = p if p.dtype == s.dtype else torch.empty(p.shape, dtype=s.dtype, device="cpu")
    gate = as_float32(alpha)
    offset = None if bias is None else as_float32(bias)
    _native.library().rung_forward_cpu(
        p.data_ptr(),
        s_rows.data_ptr(),
        _native.pointer(offset),
        gate.data_ptr(),
        z.data_ptr(),
        *p.shape,
        gate.numel(),
        p.stride(0),
        s_rows.stride(0),
        _native.dtype_code(p.dtype),
        _native.dtype_code(s.dtype),
        temperature,
        torch.get_num_threads(),
    )
    return z.view(s.shape)


def backward(
    dz: torch.Tensor,
    h: torch.Tensor | None,
    s: torch.Tensor | None,
    z: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
    need_ds: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """ds, dweight, dbias, dalpha; the last three in float32, None where not wanted (h: dweight, s and z: dalpha)."""
    g = as_rows(dz)
    # where dalpha is not wanted the kernel still reads s and z: give it dz, which costs no extra traffic
    s_rows, z_rows = (g, g) if s is None or z is None else (as_rows(s), as_rows(z))
    gate = as_float32(alpha)
    ds = torch.empty(g.shape, dtype=g.dtype, device="cpu") if need_ds else None
    dbias = torch.empty(g.shape[1], dtype=torch.float32, device="cpu") if need_dbias else None
    dalpha = torch.empty(gate.shape, dtype=torch.float32, device="cpu") if s is not None else None
    _native.library().rung_backward_cpu(
        g.data_ptr(),
        s_rows.data_ptr(),
        z_rows.data_ptr(),
        gate.data_ptr(),
        _native.pointer(ds),
        _native.pointer(dbias),
        _native.pointer(dalpha),
        *g.shape,
        gate.numel(),
        g.stride(0),
        s_rows.stride(0),
        z_rows.stride(0),
        _native.dtype_code(g.dtype),
        temperature,
        torch.get_num_threads(),
    )
    dweight = None
    if h is not None:
        dweight = linear(g.to(h.dtype).t(), as_rows(h).t()).float()
        dweight.mul_(torch.sigmoid(-gate / temperature).unsqueeze(-1))  # rows scale: the product could take dz itself
    return (
        None if ds is None else ds.view(dz.shape),
        dweight,
        dbias,
        dalpha,
    )
