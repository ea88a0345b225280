"""Frozen linear layers on the GPU in Triton: int8 and fp8 products, and nf4 weights unpacked tile by tile.

All give activation(x @ weight.T + bias), with scales, bias and activation applied to the sums while they are still in
registers. Programs that run at the same time work on neighbouring tiles, so that what they read stays in the L2 cache.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .formats import NF4

# Programs a launch aims at, the multiprocessors of a large GPU: smaller tiles are taken where larger ones are fewer.
_PROGRAMS = 132
# Rows of tiles that run together: a column of tiles reads their part of x again and again, from the L2 cache.
_GROUP = 8


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    # the first rows of x and of the weight that this program multiplies: in GROUP rows of tiles, column after column
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return (first + inside % height).to(tl.int64) * BLOCK_M, (inside // height).to(tl.int64) * BLOCK_N


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) is sigmoid(2u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # not a maximum, which would hide NaN
    return x


@triton.jit
def _finish(y, bias_ptr, outputs, inside, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    # bias and activation of sums in float32  # [BLOCK_M, BLOCK_N]
    if HAS_BIAS:
        y += tl.load(bias_ptr + outputs, mask=inside, other=0.0)[None, :]
    return _activate(y, ACTIVATION)


@triton.jit
def _quantised_linear(
    values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K,
    SUM: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # SUM: the type of the sums, int32 of int8 values and float32 of fp8 ones
    first_row, first_output = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, output, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_inside, output_inside = row < M - first_row, output < N - first_output
    values = values_ptr + first_row * K + (row[:, None] * K + depth[None, :])
    weights = weight_ptr + first_output * K + (output[None, :] * K + depth[:, None])
    product = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for start in range(0, K, BLOCK_K):
        inside = depth < K - start
        x = tl.load(values, mask=row_inside[:, None] & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(weights, mask=output_inside[None, :] & inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        product = tl.dot(x, w, product, out_dtype=SUM)
        values += BLOCK_K
        weights += BLOCK_K
    row_scale = tl.load(row_scale_ptr + first_row + row, mask=row_inside, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + first_output + output, mask=output_inside, other=0.0)
    y = product.to(tl.float32) * row_scale[:, None] * weight_scale[None, :]  # [BLOCK_M, BLOCK_N]
    y = _finish(y, bias_ptr, first_output + output, output_inside, HAS_BIAS, ACTIVATION)
    y_tile = y_ptr + first_row * N + first_output + (row[:, None] * N + output[None, :])
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=row_inside[:, None] & output_inside[None, :])


@triton.jit
def int8_linear_fwd_kernel(
    values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _quantised_linear(
        values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
        tl.int32, HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip


@triton.jit
def fp8_linear_fwd_kernel(
    values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _quantised_linear(
        values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K,
        tl.float32, HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip


@triton.jit
def nf4_linear_fwd_kernel(
    x_ptr, codes_ptr, group_scale_ptr, row_scale_ptr, bias_ptr, numbers_ptr, y_ptr,
    M, N, K, stride_x,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # the product is weight @ x.T: where x has few rows, they take the tensor core's narrow side
    first_row, first_output = _tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, output = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    depth, pair, group = tl.arange(0, 64 * GROUPS), tl.arange(0, 32 * GROUPS), tl.arange(0, GROUPS)
    row_inside, output_inside = row < M - first_row, output < N - first_output
    x_tile = x_ptr + first_row * stride_x + (row[None, :] * stride_x + depth[:, None])
    codes = codes_ptr + first_output * (K // 2) + (output[:, None] * (K // 2) + pair[None, :])
    group_scales = group_scale_ptr + first_output * (K // 64) + (output[:, None] * (K // 64) + group[None, :])
    numbers = tl.load(numbers_ptr + tl.arange(0, 16))
    product = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, 64 * GROUPS):
        code_inside = output_inside[:, None] & (pair < (K - start) // 2)[None, :]
        group_inside = output_inside[:, None] & (group < (K - start) // 64)[None, :]
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
    y = _finish(y, bias_ptr, first_output + output, output_inside, HAS_BIAS, ACTIVATION)
    y_tile = y_ptr + first_row * N + first_output + (row[:, None] * N + output[None, :])
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=row_inside[:, None] & output_inside[None, :])


def quantised_configs(capability: int, activation: str, y_bytes: int) -> list[dict[str, int]]:
    """Tile sizes of int8 and fp8 products on a GPU of a capability (90 for 9.0), largest first; no spills."""
    tiles = [(128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4)]
    tiles += [(16, 64, 256, 4, 4), (16, 32, 256, 4, 4)]
    # sums that nearly fill the registers leave none for an activation, nor for addresses of wider outputs
    if capability // 10 == 9 and activation == "none" and y_bytes == 2:
        tiles.insert(0, (256, 128, 128, 8, 3))
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [{"GROUP": _GROUP, **dict(zip(names, tile, strict=True))} for tile in tiles]


def nf4_configs(x_bytes: int) -> list[dict[str, int]]:
    """The same of nf4 products, for bytes an element of x; GROUPS of 64 weights are unpacked at a time."""
    if x_bytes == 4:
        tiles = [(32, 32, 1, 4, 2), (16, 32, 1, 4, 3)]
    else:
        tiles = [(128, 64, 1, 4, 3), (64, 64, 1, 4, 4), (32, 64, 2, 4, 4), (16, 64, 2, 4, 4), (16, 32, 4, 4, 4)]
    names = ("BLOCK_M", "BLOCK_N", "GROUPS", "num_warps", "num_stages")
    return [{"GROUP": _GROUP, **dict(zip(names, tile, strict=True))} for tile in tiles]


def choose(configs: list[dict[str, int]], rows: int, outputs: int) -> dict[str, int]:
    """The largest tile, of those no taller than the rows ask for, with enough programs for a GPU; else the smallest."""
    fitting = [c for c in configs if c["BLOCK_M"] <= max(configs[-1]["BLOCK_M"], triton.next_power_of_2(rows))]
    return next((c for c in fitting if programs(c, rows, outputs) >= _PROGRAMS), fitting[-1])


def programs(config: dict[str, int], rows: int, outputs: int) -> int:
    """How many tiles of a configuration cover the output."""
    return triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(outputs, config["BLOCK_N"])


@functools.cache
def _capability(device: torch.device) -> int:
    # Triton's interpreter runs what any GPU does
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _numbers(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def int8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """activation(row_scale * weight_scale * (values @ weight.T) + bias), (M, N) in out_dtype; sums are exact.

    values int8 (M, K) and weight int8 (N, K), K a multiple of 16; row_scale (M,), weight_scale and bias (N,) float32.
    At least M K + N K + M N out_bytes + 4 (M + 2 N) bytes and 2 M N K operations, int8 at twice the rate of bfloat16.
    """
    return _quantised(int8_linear_fwd_kernel, values, row_scale, weight, weight_scale, bias, activation, out_dtype)


def fp8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """activation(row_scale * weight_scale * (values @ weight.T) + bias), (M, N) in out_dtype, for float8_e4m3fn.

    Shapes, bytes and operations as for int8, at the same rate. A Hopper tensor core keeps fewer bits of the sums than
    float32 has (torch._scaled_mm's use_fast_accum), as Transformer Engine lets it in its forward passes.
    RuntimeError on a GPU below compute capability 9.0.
    """
    capability = _capability(values.device)
    if capability < 90:
        raise RuntimeError(
            f"fp8 products need a GPU of compute capability 9.0 or newer, and {values.device} has {capability / 10}:"
            " use precision='int8' or 'bf16'"
        )
    return _quantised(fp8_linear_fwd_kernel, values, row_scale, weight, weight_scale, bias, activation, out_dtype)


def _quantised(
    kernel: triton.JITFunction,
    values: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    (count, depth), outputs = values.shape, weight.shape[0]
    y = torch.empty((count, outputs), dtype=out_dtype, device=values.device)
    if y.numel():
        configs = quantised_configs(_capability(values.device), activation, y.element_size())
        config = choose(configs, count, outputs)
        kernel[(programs(config, count, outputs),)](
            values.contiguous(),
            row_scale,
            weight,
            weight_scale,
            bias,
            y,
            count,
            outputs,
            depth,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            **config,
        )
    return y


def nf4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    group_scale_codes: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """activation(x @ weight.T + bias), (M, N) in the dtype of x; weight = NF4[code] row_scale group_scale_code / 255.

    x (M, K) of neighbouring columns in float32, bfloat16 or float16; codes uint8 (N, K/2), even k in the low half;
    group_scale_codes uint8 (N, K/64), of 64 neighbouring k; row_scale and bias float32 (N,). A tile of the weight is
    unpacked in registers and multiplied in the dtype of x, row_scale comes to the sums, in float32.
    At least N K (1/2 + 1/64) + (M K + M N) x_bytes + 8 N bytes and 2 M N K operations at the rate of x's dtype. Every
    BLOCK_M rows unpack the weight again, which takes about 6 instructions a number.
    """
    (count, depth), outputs = x.shape, codes.shape[0]
    y = torch.empty((count, outputs), dtype=x.dtype, device=x.device)
    if y.numel():
        config = choose(nf4_configs(x.element_size()), count, outputs)
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
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            PRECISION="ieee",
            **config,
        )
    return y
