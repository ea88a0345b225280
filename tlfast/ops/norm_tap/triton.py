"""Sum, norm and quantisation on the GPU in Triton: a program holds a row, read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._quantised import LARGEST
from .._rows import as_rows
from ..quantise_rows.triton import magnitude_bits, row_scale, store_quantised
from .reference import Quantised


@triton.jit
def norm_tap_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, values_ptr, scale_ptr,
    D, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, RMS: tl.constexpr,
    LARGEST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = columns < D
    total = tl.load(x_ptr + row * stride_x + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + row * stride_residual + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * D + columns, total.to(total_ptr.dtype.element_ty), mask=mask)
    if not RMS:
        total = tl.where(mask, total - tl.sum(total, axis=0) / D, 0.0)
        # a mean is rounded, by much where all of the row is far from 0: what is left of it is taken off
        total = tl.where(mask, total - tl.sum(total, axis=0) / D, 0.0)
    variance = tl.sum(total * total, axis=0) / D
    y = total * tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(variance + eps))  # [BLOCK_D]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0)
    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=mask)
    if LARGEST > 0.0:
        scale, inverse = row_scale(tl.max(magnitude_bits(tl.where(mask, y, 0.0)), axis=0), LARGEST)
        tl.store(scale_ptr + row, scale)
        store_quantised(values_ptr + row * D + columns, y, inverse, mask, LARGEST)


def config(width: int) -> dict[str, int]:
    """Tile size for a width: 8 numbers a thread, 16 or 32 of the widest."""
    block = triton.next_power_of_2(width)
    warps = block // 256 if block < 4096 else block // 512 if block < 8192 else block // 1024
    return {"BLOCK_D": block, "num_warps": max(1, warps), "num_stages": 1}


def norm_tap(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    quantise: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor, Quantised | None]:
    width = x.shape[-1]
    x_rows = as_rows(x)
    residual_rows = None if residual is None else as_rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values = scale = None
    if quantise is not None:
        values = torch.empty(x.shape, dtype=quantise, device=x.device)
        scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        norm_tap_fwd_kernel[(x.numel() // width,)](
            x_rows,
            residual_rows,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            total,
            y,
            values,
            scale,
            width,
            x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            RMS=rms,
            LARGEST=0.0 if quantise is None else LARGEST[quantise],
            **config(width),
        )
    return total, y, None if values is None or scale is None else (values, scale)
