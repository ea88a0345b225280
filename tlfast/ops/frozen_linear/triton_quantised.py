"""Products of 8-bit activations and weights on the GPU in Triton: int8 and fp8.

Scales, bias, activation and gates are applied to the sums while they are still in registers. Programs that run at the
same time work on neighbouring tiles, so that what they read stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._gpu import capability as _capability
from .triton_tiles import choose, configurations, finish, programs, tile


@triton.jit
def _quantised_linear(
    values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K, stride_weight,
    SUM: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # SUM: the type of the sums, int32 of int8 values and float32 of fp8 ones
    first_row, first_output = tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    row, output, depth = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_inside, output_inside = row < M - first_row, output < N - first_output
    values = values_ptr + first_row * K + (row[:, None] * K + depth[None, :])
    weights = weight_ptr + first_output * stride_weight + (output[None, :] * stride_weight + depth[:, None])
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
    finish(y, bias_ptr, y_ptr, first_row, first_output, M, N, HAS_BIAS, ACTIVATION, GATED, BLOCK_M, BLOCK_N)


@triton.jit
def int8_linear_fwd_kernel(
    values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K, stride_weight,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _quantised_linear(
        values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K, stride_weight,
        tl.int32, HAS_BIAS, ACTIVATION, GATED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip


@triton.jit
def fp8_linear_fwd_kernel(
    values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr,
    M, N, K, stride_weight,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    _quantised_linear(
        values_ptr, row_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, y_ptr, M, N, K, stride_weight,
        tl.float32, HAS_BIAS, ACTIVATION, GATED, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip


def quantised_configs(capability: int, activation: str, y_bytes: int, gated: bool = False) -> list[dict[str, int]]:
    """Tile sizes of int8 and fp8 products on a GPU of a capability (90 for 9.0), largest first; no spills."""
    tiles = [(128, 128, 128, 8, 3), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4)]
    tiles += [(16, 64, 256, 4, 4), (16, 32, 256, 4, 4)]
    # sums that nearly fill the registers leave few for an activation, and none for addresses of wider outputs
    generation, simple = capability // 10, activation == ("silu" if gated else "none")
    if generation == 9 and simple and y_bytes == 2:
        tiles.insert(0, (256, 128, 128, 8, 3))
    if generation >= 10 and gated and not simple:
        tiles[0] = (128, 64, 128, 8, 4)
    return configurations("BLOCK_K", tiles)


def int8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    gated: bool = False,
) -> torch.Tensor:
    """activation(row_scale * weight_scale * (values @ weight.T) + bias), (M, N) in out_dtype; sums are exact.

    values int8 (M, K) and weight int8 (N, K) of neighbouring columns, fast for strides of a multiple of 16; row_scale
    (M,), weight_scale and bias (N,) float32. gated: outputs are gates and what they gate in turns of 1, the result is
    activation(gates) * rest, (M, N / 2).
    At least M K + N K + M N out_bytes + 4 (M + 2 N) bytes and 2 M N K operations, int8 at twice the rate of bfloat16.
    """
    layer = values, row_scale, weight, weight_scale, bias
    return _quantised(int8_linear_fwd_kernel, *layer, activation, out_dtype, gated)


def fp8_linear(
    values: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    gated: bool = False,
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
    layer = values, row_scale, weight, weight_scale, bias
    return _quantised(fp8_linear_fwd_kernel, *layer, activation, out_dtype, gated)


def _quantised(
    kernel: triton.JITFunction,
    values: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    gated: bool,
) -> torch.Tensor:
    (count, depth), outputs = values.shape, weight.shape[0]
    y = torch.empty((count, outputs // 2 if gated else outputs), dtype=out_dtype, device=values.device)
    if y.numel():
        configs = quantised_configs(_capability(values.device), activation, y.element_size(), gated)
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
            weight.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            **config,
        )
    return y
