"""A rung on the GPU: cuBLAS computes the products, csrc/ops/cuda/rung.cu what is bound by memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ... import _native
from .._rows import as_float32, as_operand, as_rows


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def forward(  # pragma: gpu
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    p = F.linear(as_operand(h), weight.to(h.dtype))  # (rows, R)
    s_rows = as_rows(s)
    z = p if p.dtype == s.dtype else torch.empty(p.shape, dtype=s.dtype, device=s.device)
    gate = as_float32(alpha)
    offset = None if bias is None else as_float32(bias)
    with torch.cuda.device(h.device):
        _native.library().rung_forward_cuda(
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
            _stream(h),
        )
    return z.view(s.shape)


def backward(  # pragma: gpu
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
    s_rows, z_rows = (g, g) if s is None or z is None else (as_rows(s), as_rows(z))
    gate = as_float32(alpha)
    ds = torch.empty(g.shape, dtype=g.dtype, device=g.device) if need_ds else None
    # the kernel adds its blocks' sums into these
    dbias = torch.zeros(g.shape[1], dtype=torch.float64, device=g.device) if need_dbias else None
    dalpha = torch.zeros(gate.shape, dtype=torch.float64, device=g.device) if s is not None else None
    with torch.cuda.device(g.device):
        _native.library().rung_backward_cuda(
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
            _stream(g),
        )
    dweight = None
    if h is not None:
        dweight = (as_operand(g.to(h.dtype)).t() @ as_operand(h)).float()
        dweight.mul_(torch.sigmoid(-gate / temperature).unsqueeze(-1))
    return (
        None if ds is None else ds.view(dz.shape),
        dweight,
        None if dbias is None else dbias.float(),
        None if dalpha is None else dalpha.float(),
    )
