"""Products with weights of 4 and 8 bits that are unpacked tile by tile, on the GPU in Triton.

The product is weight @ x.T: a tile of the weight goes from registers to the tensor core, and where x has few rows they
take its narrow side. Every BLOCK_M rows unpack the weight again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .formats import NF4
from .triton_tiles import choose, configurations, finish, programs, tile


@triton.jit
def nf4_linear_fwd_kernel(
    x_ptr, codes_ptr, group_scale_ptr, row_scale_ptr, bias_ptr, numbers_ptr, y_ptr,
    M, N, K, stride_x, stride_codes, stride_groups,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    first_row, first_output = tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, output = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    depth, pair, group = tl.arange(0, 64 * GROUPS), tl.arange(0, 32 * GROUPS), tl.arange(0, GROUPS)
    row_inside, output_inside = row < M - first_row, output < N - first_output
    x_tile = x_ptr + first_row * stride_x + (row[None, :] * stride_x + depth[:, None])
    codes = codes_ptr + first_output * stride_codes + (output[:, None] * stride_codes + pair[None, :])
    group_scales = group_scale_ptr + first_output * stride_groups + (output[:, None] * stride_groups + group[None, :])
    numbers = tl.load(numbers_ptr + tl.arange(0, 16))
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, 64 * GROUPS):
        code_inside = output_inside[:, None] & (pair * 2 < K - start)[None, :]
        group_inside = output_inside[:, None] & (group * 64 < K - start)[None, :]
        x = tl.load(x_tile, mask=(depth < K - start)[:, None] & row_inside[None, :], other=0.0)
        code = tl.load(codes, mask=code_inside, other=0).to(tl.int32)  # [BLOCK_N, 32 GROUPS]
        scale = tl.load(group_scales, mask=group_inside, other=0).to(tl.float32) * (1.0 / 255.0)  # [BLOCK_N, GROUPS]
        # A flat gather reads the numbers from shared memory. Loads through pointers would be prefetched one by one.
        code = tl.reshape(tl.join(code & 15, code >> 4), (BLOCK_N * GROUPS * 64,))
        w = tl.reshape(tl.gather(numbers, code, 0), (BLOCK_N, GROUPS, 64)) * scale[:, :, None]
        w = tl.reshape(w, (BLOCK_N, 64 * GROUPS)).to(x.dtype)
        product = tl.dot(w, x, product, input_precision=PRECISION)
        x_tile += 64 * GROUPS
        codes += 32 * GROUPS
        group_scales += GROUPS
    row_scale = tl.load(row_scale_ptr + first_output + output, mask=output_inside, other=0.0)
    y = tl.trans(product * row_scale[:, None])  # [BLOCK_M, BLOCK_N]
    finish(y, bias_ptr, y_ptr, first_row, first_output, M, N, HAS_BIAS, ACTIVATION, GATED, BLOCK_M, BLOCK_N)


@triton.jit
def int8_weight_linear_fwd_kernel(
    x_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K, stride_x, stride_weight,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    first_row, first_output = tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, output, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_inside, output_inside = row < M - first_row, output < N - first_output
    x_tile = x_ptr + first_row * stride_x + (row[None, :] * stride_x + depth[:, None])
    weights = weight_ptr + first_output * stride_weight + (output[:, None] * stride_weight + depth[None, :])
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        x = tl.load(x_tile, mask=inside[:, None] & row_inside[None, :], other=0.0)  # [BLOCK_K, BLOCK_M]
        w = tl.load(weights, mask=output_inside[:, None] & inside[None, :], other=0)  # [BLOCK_N, BLOCK_K]
        product = tl.dot(w.to(x.dtype), x, product, input_precision=PRECISION)
        x_tile += BLOCK_K
        weights += BLOCK_K
    weight_scale = tl.load(weight_scale_ptr + first_output + output, mask=output_inside, other=0.0)
    y = tl.trans(product * weight_scale[:, None])  # [BLOCK_M, BLOCK_N]
    finish(y, bias_ptr, y_ptr, first_row, first_output, M, N, HAS_BIAS, ACTIVATION, GATED, BLOCK_M, BLOCK_N)


def nf4_configs(x_bytes: int, y_bytes: int) -> list[dict[str, int]]:
    """Tile sizes of nf4 products for bytes an element, largest first, without spills; GROUPS of 64 are unpacked at a
    time."""
    if x_bytes == 4:
        return configurations("GROUPS", [(32, 32, 1, 4, 2), (16, 32, 1, 4, 3)])
    tiles = [(128, 64, 1, 4, 3), (64, 64, 1, 4, 4), (32, 64, 2, 4, 4), (16, 64, 2, 4, 4), (16, 32, 4, 4, 4)]
    return configurations("GROUPS", _fitting(tiles, y_bytes))


def int8_weight_configs(x_bytes: int, y_bytes: int) -> list[dict[str, int]]:
    """The same of products with weights in int8."""
    if x_bytes == 4:
        return configurations("BLOCK_K", [(32, 32, 64, 4, 2), (16, 32, 64, 4, 3)])
    tiles = [(128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 4), (32, 64, 128, 4, 4), (16, 64, 128, 4, 4)]
    return configurations("BLOCK_K", _fitting([*tiles, (16, 32, 256, 4, 4)], y_bytes))


def _fitting(tiles: Sequence[tuple[int, ...]], y_bytes: int) -> Sequence[tuple[int, ...]]:
    # addresses of wider outputs take the registers that the largest tiles leave
    return tiles if y_bytes == 2 else [sizes for sizes in tiles if sizes[0] < 128]


@functools.cache
def _numbers(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def nf4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    group_scale_codes: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """activation(x @ weight.T + bias), (M, N) in out_dtype; weight = NF4[code] row_scale group_scale_code / 255.

    x (M, K) of neighbouring columns in float32, bfloat16 or float16; codes uint8 (N, K/2), even k in the low half;
    group_scale_codes uint8 (N, K/64), of 64 neighbouring k, each rounded up; row_scale and bias float32 (N,).
    out_dtype: None: that of x. gated: as in int8_linear. A tile of the weight is unpacked in registers and multiplied
    in the dtype of x, row_scale comes to the sums, in float32.
    At least N K (1/2 + 1/64) + (M K + M N) x_bytes + 8 N bytes and 2 M N K operations at the rate of x's dtype. Every
    BLOCK_M rows unpack the weight again, which takes about 6 instructions a number.
    """
    (count, depth), outputs = x.shape, codes.shape[0]
    y = torch.empty((count, outputs // 2 if gated else outputs), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel():
        config = choose(nf4_configs(x.element_size(), y.element_size()), count, outputs)
        nf4_linear_fwd_kernel[(programs(config, count, outputs),)](
            x,
            codes,
            group_scale_codes,
            row_scale,
            bias,
            _numbers(x.device),
            y,
            count,
            outputs,
            depth,
            x.stride(0),
            codes.stride(0),
            group_scale_codes.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            PRECISION="ieee",
            **config,
        )
    return y


def int8_weight_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """activation(weight_scale * (x @ weight.T) + bias), (M, N) in out_dtype (None: that of x).

    x (M, K) of neighbouring columns in float32, bfloat16 or float16; weight int8 (N, K), which these dtypes hold
    exactly; weight_scale and bias float32 (N,). gated: as in int8_linear.
    At least N K + (M K + M N) x_bytes + 8 N bytes and 2 M N K operations at the rate of x's dtype.
    """
    (count, depth), outputs = x.shape, weight.shape[0]
    y = torch.empty((count, outputs // 2 if gated else outputs), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel():
        config = choose(int8_weight_configs(x.element_size(), y.element_size()), count, outputs)
        int8_weight_linear_fwd_kernel[(programs(config, count, outputs),)](
            x,
            weight,
            weight_scale,
            bias,
            y,
            count,
            outputs,
            depth,
            x.stride(0),
            weight.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            PRECISION="ieee",
            **config,
        )
    return y
