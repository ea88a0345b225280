"""Quantised rows on the GPU in Triton: one program a row, read twice, the second time from the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._quantised import LARGEST, SMALLEST_SCALE
from .._rows import as_rows

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def magnitude_bits(x):
    # magnitudes compare as their bits do, NaN above infinity: a maximum over them passes NaN on
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scale(largest_bits, LARGEST: tl.constexpr):
    """The scale of a row, and its inverse: 0 where no value but 0 can be told."""
    magnitude = largest_bits.to(tl.float32, bitcast=True)
    largest = tl.full((), LARGEST, tl.float32)
    scale = tl.div_rn(magnitude, largest)
    told = (scale >= _SMALLEST_SCALE) & (largest_bits < 0x7F800000)
    inverse = tl.where(told, tl.div_rn(largest, magnitude), 0.0)
    return tl.where(scale < _SMALLEST_SCALE, 0.0, scale), inverse


@triton.jit
def store_quantised(to, x, inverse, mask, LARGEST: tl.constexpr):
    # also takes the place of NaN and infinity, whose product with 0 is NaN
    scaled = tl.where(inverse > 0.0, tl.minimum(x * inverse, LARGEST), 0.0)
    if LARGEST == 127.0:
        # 1.5 * 2^23: adding it rounds to nearest even. The minimum keeps the sum from being fused with the product.
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(to, scaled.to(to.dtype.element_ty), mask=mask)


@triton.jit
def quantise_rows_fwd_kernel(
    x_ptr, smooth_ptr, values_ptr, scale_ptr,
    D, stride_x,
    HAS_SMOOTH: tl.constexpr, LARGEST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    largest = tl.zeros((BLOCK_D,), dtype=tl.int32)
    for start in range(0, D, BLOCK_D):
        mask = start + columns < D
        x = tl.load(x_ptr + row * stride_x + start + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D]
        if HAS_SMOOTH:
            x *= tl.load(smooth_ptr + start + columns, mask=mask, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(x))
    scale, inverse = row_scale(tl.max(largest, axis=0), LARGEST)
    tl.store(scale_ptr + row, scale)
    for start in range(0, D, BLOCK_D):
        mask = start + columns < D
        x = tl.load(x_ptr + row * stride_x + start + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D]
        if HAS_SMOOTH:
            x *= tl.load(smooth_ptr + start + columns, mask=mask, other=0.0)
        store_quantised(values_ptr + row * D + start + columns, x, inverse, mask, LARGEST)


def config(width: int) -> dict[str, int]:
    """Tile size for a width: one tile up to 2048 numbers, 8 a thread."""
    block = min(2048, triton.next_power_of_2(width))
    return {"BLOCK_D": block, "num_warps": max(1, min(8, block // 256)), "num_stages": 1}


def quantise_rows(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    x_rows = as_rows(x)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if scale.numel():
        quantise_rows_fwd_kernel[(scale.numel(),)](
            x_rows,
            None if smooth is None else smooth.contiguous(),
            values,
            scale,
            x.shape[-1],
            x_rows.stride(0),
            HAS_SMOOTH=smooth is not None,
            LARGEST=LARGEST[dtype],
            **config(x.shape[-1]),
        )
    return values, scale
