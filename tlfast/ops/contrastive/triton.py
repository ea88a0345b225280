"""The two reductions on the GPU in Triton: tiles of scores stay in registers; the backward writes its weights in parts.

Forward: a program holds a block of rows and walks along columns; it writes one partial result a column of its block,
which PyTorch adds up. Backward: the kernel writes d loss / d score for some rows of the map, in the inputs' dtype, and
two matrix products (cuBLAS) use it at once: four products in all, where kernels that also multiply would need five.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .tiles import Gradients, Pairs, Reduced, Wanted, gradients, parts

# Blocks of rows that a forward launch covers: bounds its partial results, one number a block and column.
_LAUNCH_BLOCKS = 128
_PROGRAMS = 1024  # a launch has at least about so many, where there is enough work
_WEIGHT_BYTES = 2**28  # of d loss / d score that exist at once


@triton.jit
def scores(
    u_ptr, v_ptr, scale_ptr, rows, columns, N, M, D, stride_u, stride_v,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # D is a multiple of BLOCK_D; rows past the last are read as the last and left out by who called
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    depth = tl.arange(0, BLOCK_D)
    u_at = u_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_u + depth[None, :]  # [BLOCK_N, BLOCK_D]
    v_at = v_ptr + tl.minimum(columns, M - 1).to(tl.int64)[None, :] * stride_v + depth[:, None]  # [BLOCK_D, BLOCK_M]
    for _ in range(0, D, BLOCK_D):
        total = tl.dot(tl.load(u_at), tl.load(v_at), total, input_precision="ieee")
        u_at += BLOCK_D
        v_at += BLOCK_D
    return total * tl.load(scale_ptr)  # [BLOCK_N, BLOCK_M]


@triton.jit
def softplus_and_sigmoid(x):
    small = tl.exp(-tl.abs(x))
    # log1p(small) = 2 artanh(t), t <= 1/3: right to the last digits near 0, too
    t = small / (2.0 + small)
    square = t * t
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    softplus = tl.maximum(x, 0.0) + 2.0 * t + 2.0 * t * square * series
    return softplus, tl.where(x < 0.0, small, 1.0) / (1.0 + small)


@triton.jit
def without_own(s, own_ptr, rows, columns, first, N, M, offset, BLOCK_M: tl.constexpr):
    """Writes the own pairs' scores of a tile and returns it with -inf for them and for what is outside the map."""
    is_own = columns[None, :] == rows[:, None] + offset
    here = (rows + offset >= first) & (rows + offset < first + BLOCK_M) & (rows < N)
    tl.store(own_ptr + rows, tl.sum(tl.where(is_own, s, 0.0), axis=1), mask=here)
    return tl.where(is_own | (rows >= N)[:, None] | (columns >= M)[None, :], float("-inf"), s)


@triton.jit
def contrastive_softmax_fwd_kernel(
    u_ptr, v_ptr, scale_ptr, rows_ptr, columns_ptr, own_ptr, N, M, D, stride_u, stride_v, offset, split_columns,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(split * split_columns, tl.minimum(M, (split + 1) * split_columns), BLOCK_M):
        columns = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        s = scores(u_ptr, v_ptr, scale_ptr, rows, columns, N, M, D, stride_u, stride_v, BLOCK_N, BLOCK_M, BLOCK_D)
        s = without_own(s, own_ptr, rows, columns, first, N, M, offset, BLOCK_M)

        column_largest = tl.max(s, axis=0)  # [BLOCK_M]
        shift = tl.where(column_largest == float("-inf"), 0.0, column_largest)  # exp(-inf - 0) is 0, not NaN
        column_total = tl.sum(tl.exp(s - shift[None, :]), axis=0)
        tl.store(columns_ptr + block.to(tl.int64) * M + columns, shift + tl.log(column_total), mask=columns < M)

        next_largest = tl.maximum(largest, tl.max(s, axis=1))  # [BLOCK_N]
        shift_rows = tl.where(next_largest == float("-inf"), 0.0, next_largest)
        total = total * tl.exp(largest - shift_rows) + tl.sum(tl.exp(s - shift_rows[:, None]), axis=1)
        largest = next_largest
    shift_rows = tl.where(largest == float("-inf"), 0.0, largest)
    tl.store(rows_ptr + split.to(tl.int64) * N + rows, shift_rows + tl.log(total), mask=rows < N)


@triton.jit
def contrastive_softmax_bwd_kernel(
    u_ptr, v_ptr, scale_ptr, rows_ptr, drows_ptr, columns_ptr, dcolumns_ptr, down_ptr, w_ptr,
    N, M, D, stride_u, stride_v, offset,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = scores(u_ptr, v_ptr, scale_ptr, rows, columns, N, M, D, stride_u, stride_v, BLOCK_N, BLOCK_M, BLOCK_D)
    lse = tl.load(rows_ptr + rows, mask=rows < N, other=0.0)
    weight = tl.load(drows_ptr + rows, mask=rows < N, other=0.0)
    column_lse = tl.load(columns_ptr + columns, mask=columns < M, other=0.0)
    column_weight = tl.load(dcolumns_ptr + columns, mask=columns < M, other=0.0)
    w = weight[:, None] * tl.exp(s - lse[:, None]) + column_weight[None, :] * tl.exp(s - column_lse[None, :])
    own = tl.load(down_ptr + rows, mask=rows < N, other=0.0)
    w = tl.where(columns[None, :] == rows[:, None] + offset, own[:, None], w)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    to = w_ptr + rows.to(tl.int64)[:, None] * M + columns[None, :]
    tl.store(to, w.to(w_ptr.dtype.element_ty), mask=inside)


@triton.jit
def contrastive_sigmoid_fwd_kernel(
    u_ptr, v_ptr, scale_ptr, bias_ptr, rows_ptr, slopes_ptr, own_ptr,
    N, M, D, stride_u, stride_v, offset, split_columns,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    total, slope = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    bias = tl.load(bias_ptr)
    for first in range(split * split_columns, tl.minimum(M, (split + 1) * split_columns), BLOCK_M):
        columns = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        s = scores(u_ptr, v_ptr, scale_ptr, rows, columns, N, M, D, stride_u, stride_v, BLOCK_N, BLOCK_M, BLOCK_D)
        s = without_own(s, own_ptr, rows, columns, first, N, M, offset, BLOCK_M)
        softplus, sigmoid = softplus_and_sigmoid(s + bias)  # both 0 for -inf
        total += tl.sum(softplus, axis=1)
        slope += tl.sum(sigmoid, axis=1)
    tl.store(rows_ptr + split.to(tl.int64) * N + rows, total, mask=rows < N)
    tl.store(slopes_ptr + split.to(tl.int64) * N + rows, slope, mask=rows < N)


@triton.jit
def contrastive_sigmoid_bwd_kernel(
    u_ptr, v_ptr, scale_ptr, bias_ptr, drows_ptr, down_ptr, w_ptr, N, M, D, stride_u, stride_v, offset,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    s = scores(u_ptr, v_ptr, scale_ptr, rows, columns, N, M, D, stride_u, stride_v, BLOCK_N, BLOCK_M, BLOCK_D)
    x = s + tl.load(bias_ptr)
    small = tl.exp(-tl.abs(x))
    weight = tl.load(drows_ptr + rows, mask=rows < N, other=0.0)
    w = weight[:, None] * (tl.where(x < 0.0, small, 1.0) / (1.0 + small))
    own = tl.load(down_ptr + rows, mask=rows < N, other=0.0)
    w = tl.where(columns[None, :] == rows[:, None] + offset, own[:, None], w)
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    to = w_ptr + rows.to(tl.int64)[:, None] * M + columns[None, :]
    tl.store(to, w.to(w_ptr.dtype.element_ty), mask=inside)


def config(dtype: torch.dtype, forward: bool) -> dict[str, int]:
    """Tile sizes for inputs of a dtype. The forward's two reductions take registers, so do float32's products."""
    if dtype == torch.float32:  # multiplied without tensor cores
        return {"BLOCK_N": 64, "BLOCK_M": 32 if forward else 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_M": 64 if forward else 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


def _whole_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """x, or a copy whose rows begin at multiples of 16 and end in zeros: loads are wide and need no mask."""
    missing = -x.shape[1] % block
    if missing == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, missing)).contiguous()


class _Operands:
    """Pairs as the kernels take them, and how their launches are divided."""

    def __init__(self, pairs: Pairs, forward: bool) -> None:
        self.config = config(pairs.u.dtype, forward)
        self.u, self.v = (_whole_blocks(x, self.config["BLOCK_D"]) for x in (pairs.u, pairs.v))
        self.scale, self.offset = pairs.scale.reshape(1), pairs.offset
        self.rows_a_launch = _LAUNCH_BLOCKS * self.config["BLOCK_N"]

    def split(self, rows: int) -> tuple[tuple[int, int], int]:
        """The grid for so many rows, and the columns that a program walks along."""
        blocks, tiles = triton.cdiv(rows, self.config["BLOCK_N"]), triton.cdiv(len(self.v), self.config["BLOCK_M"])
        tiles_a_split = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, blocks)))
        return (blocks, triton.cdiv(tiles, tiles_a_split)), tiles_a_split * self.config["BLOCK_M"]

    def sizes(self, i: slice) -> tuple[int, ...]:
        """What every kernel takes after its pointers."""
        return i.stop - i.start, len(self.v), self.u.shape[1], self.u.stride(0), self.v.stride(0), i.start + self.offset

    def weights(self, i: slice) -> tuple[torch.Tensor, tuple[int, int]]:
        """Room for rows i of d loss / d score, and the grid that fills it."""
        rows, columns = i.stop - i.start, len(self.v)
        grid = (triton.cdiv(rows, self.config["BLOCK_N"]), triton.cdiv(columns, self.config["BLOCK_M"]))
        return torch.empty(rows, columns, dtype=self.u.dtype, device=self.u.device), grid

    def tile(self) -> tuple[int, int]:
        """Rows and columns of d loss / d score that exist at once."""
        block, columns = self.config["BLOCK_N"], max(1, len(self.v))
        rows = _WEIGHT_BYTES // (columns * self.u.element_size())
        return max(1, rows // block) * block, columns


def _in_units(*weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The largest number and all in units of it: those of a mean over many pairs are too small for float16."""
    largest = torch.stack([x.abs().amax() for x in weights if x.numel()] or [weights[0].new_zeros(())]).amax()
    unit = torch.where(largest > 0, largest, 1.0)
    return unit, *((x / unit).contiguous() for x in weights)


def _empty(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=like.device)


def softmax_forward(pairs: Pairs) -> Reduced:
    on = _Operands(pairs, forward=True)
    rows, own = _empty(len(on.u), like=on.u), _empty(len(on.u), like=on.u)
    columns = torch.full((len(on.v),), -torch.inf, dtype=torch.float32, device=on.u.device)
    for i in parts(len(on.u), on.rows_a_launch):
        grid, split_columns = on.split(i.stop - i.start)
        row_parts, column_parts = _empty(grid[1], i.stop - i.start, like=on.u), _empty(grid[0], len(on.v), like=on.u)
        contrastive_softmax_fwd_kernel[grid](
            on.u[i], on.v, on.scale, row_parts, column_parts, own[i], *on.sizes(i), split_columns, **on.config
        )
        rows[i] = row_parts.logsumexp(0)
        columns = torch.logaddexp(columns, column_parts.logsumexp(0))
    return rows, columns, own


def softmax_backward(
    pairs: Pairs, wanted: Wanted, dcolumns: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Gradients:
    on = _Operands(pairs, forward=False)
    unit, drows, dcolumns, down = _in_units(wanted.drows, dcolumns, wanted.down)

    def weights(i: slice, _: slice) -> torch.Tensor:
        w, grid = on.weights(i)
        contrastive_softmax_bwd_kernel[grid](
            on.u[i], on.v, on.scale, rows[i], drows[i], columns, dcolumns, down[i], w, *on.sizes(i), **on.config
        )
        return w

    du, dv, dscale = gradients(replace(pairs, scale=pairs.scale * unit), wanted, on.tile(), weights)
    return du, dv, dscale * unit


def sigmoid_forward(pairs: Pairs, bias: torch.Tensor) -> Reduced:
    on = _Operands(pairs, forward=True)
    rows, slopes, own = (_empty(len(on.u), like=on.u) for _ in range(3))
    for i in parts(len(on.u), on.rows_a_launch):
        grid, split_columns = on.split(i.stop - i.start)
        row_parts, slope_parts = (_empty(grid[1], i.stop - i.start, like=on.u) for _ in range(2))
        operands: tuple[Any, ...] = (on.u[i], on.v, on.scale, bias.reshape(1), row_parts, slope_parts, own[i])
        contrastive_sigmoid_fwd_kernel[grid](*operands, *on.sizes(i), split_columns, **on.config)
        rows[i], slopes[i] = row_parts.sum(0), slope_parts.sum(0)
    return rows, slopes, own


def sigmoid_backward(pairs: Pairs, bias: torch.Tensor, wanted: Wanted) -> Gradients:
    on = _Operands(pairs, forward=False)
    unit, drows, down = _in_units(wanted.drows, wanted.down)

    def weights(i: slice, _: slice) -> torch.Tensor:
        w, grid = on.weights(i)
        operands: tuple[Any, ...] = (on.u[i], on.v, on.scale, bias.reshape(1), drows[i], down[i], w)
        contrastive_sigmoid_bwd_kernel[grid](*operands, *on.sizes(i), **on.config)
        return w

    du, dv, dscale = gradients(replace(pairs, scale=pairs.scale * unit), wanted, on.tile(), weights)
    return du, dv, dscale * unit
