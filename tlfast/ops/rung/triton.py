"""A rung on the GPU in Triton: the tap h is read once in the forward and once in the backward pass.

A program holds every channel of the side state (BLOCK_R covers R), so no tile of h is needed twice. Sums over tokens
are written apart and added by torch in a fixed order: the result has the same bits every time. Of float32 operands
every sum is as exact as cuBLAS' split ones: products by tiles, with what rounding lost; over tokens in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._rows import as_rows
from .._triton import block_r, precision

# Programs a launch aims at, about two for each multiprocessor of a large GPU: more would only write more partial sums.
_PROGRAMS = 264


@triton.jit
def _gate(alpha_ptr, channels, R, temperature, PER_CHANNEL: tl.constexpr):
    # mu and 1 - mu, each from its own exponential: 1 - mu computed from mu would lose it where mu is close to 1
    if PER_CHANNEL:
        x = tl.load(alpha_ptr + channels, mask=channels < R, other=0.0).to(tl.float32) / temperature
    else:
        x = tl.load(alpha_ptr + channels * 0).to(tl.float32) / temperature
    return tl.sigmoid(x), tl.sigmoid(-x)  # [BLOCK_R], [BLOCK_R]


@triton.jit
def _add_product(a, b, total, left, PRECISION: tl.constexpr):
    # total + a @ b, and what rounding has left out of it (Kahan). In float32 a single chain of sums over all of D or M
    # errs more than cuBLAS, which splits it: a tile's product is summed apart, beginning with what was left out before.
    if a.dtype == tl.float32 and PRECISION == "ieee":
        product = tl.dot(a, b, left, input_precision=PRECISION)
        before = total
        total = before + product
        left = product - (total - before)
        left = tl.where(left == left, left, 0.0)  # NaN beside an infinity
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total, left


@triton.jit
def rung_fwd_kernel(
    h_ptr, s_ptr, weight_ptr, bias_ptr, alpha_ptr, z_ptr,
    M, D, R, inner_rows, stride_h_outer, stride_h_inner, stride_s, temperature,
    HAS_BIAS: tl.constexpr, PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    channels = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    columns = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    h_rows = h_ptr + (rows // inner_rows) * stride_h_outer + (rows % inner_rows) * stride_h_inner
    product = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    left = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + columns < D
        h = tl.load(
            h_rows[:, None] + (start + columns)[None, :], mask=(rows < M)[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_D]
        w = tl.load(
            weight_ptr + channels[None, :] * D + (start + columns)[:, None],
            mask=(channels < R)[None, :] & inside[:, None],
            other=0.0,
        )  # [BLOCK_D, BLOCK_R]
        product, left = _add_product(h, w, product, left, PRECISION)

    mu, rest = _gate(alpha_ptr, channels, R, temperature, PER_CHANNEL)
    if HAS_BIAS:
        product += tl.load(bias_ptr + channels, mask=channels < R, other=0.0).to(tl.float32)[None, :]
    mask = (rows < M)[:, None] & (channels < R)[None, :]
    s = tl.load(s_ptr + rows[:, None] * stride_s + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    z = mu[None, :] * s + rest[None, :] * product  # [BLOCK_M, BLOCK_R]
    tl.store(z_ptr + rows[:, None] * R + channels[None, :], z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rung_bwd_kernel(
    dz_ptr, s_ptr, z_ptr, alpha_ptr, ds_ptr, dbias_ptr, dalpha_ptr,
    M, R, rows_per_program, stride_dz, stride_s, stride_z, temperature,
    NEED_DS: tl.constexpr, NEED_DBIAS: tl.constexpr, NEED_DALPHA: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    # ds, and this program's share of dbias and dalpha: one row of [programs, R] each. The memory-bound pass has time
    # for sums of float32 in float64, which neither cancelling terms nor their order can harm.
    SUMS: tl.constexpr = tl.float64 if dz_ptr.dtype.element_ty == tl.float32 else tl.float32
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    mu, rest = _gate(alpha_ptr, channels, R, temperature, PER_CHANNEL)
    sum_dz = tl.zeros((BLOCK_R,), dtype=SUMS)
    sum_gate = tl.zeros((BLOCK_R,), dtype=SUMS)
    first = program * rows_per_program
    for start in range(0, rows_per_program, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        mask = (rows < M)[:, None] & (channels < R)[None, :]
        dz = tl.load(dz_ptr + rows[:, None] * stride_dz + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_DS:
            ds = mu[None, :] * dz  # [BLOCK_M, BLOCK_R]
            tl.store(ds_ptr + rows[:, None] * R + channels[None, :], ds.to(ds_ptr.dtype.element_ty), mask=mask)
        if NEED_DBIAS:
            sum_dz += tl.sum(dz.to(SUMS), axis=0)
        if NEED_DALPHA:
            s = tl.load(s_ptr + rows[:, None] * stride_s + channels[None, :], mask=mask, other=0.0).to(tl.float32)
            z = tl.load(z_ptr + rows[:, None] * stride_z + channels[None, :], mask=mask, other=0.0).to(tl.float32)
            sum_gate += tl.sum(dz.to(SUMS) * (s - z).to(SUMS), axis=0)
    if NEED_DBIAS:
        tl.store(dbias_ptr + program * R + channels, rest * sum_dz, mask=channels < R)
    if NEED_DALPHA:
        tl.store(dalpha_ptr + program * R + channels, mu / temperature * sum_gate, mask=channels < R)


@triton.jit
def rung_bwd_weight_kernel(
    dz_ptr, h_ptr, alpha_ptr, dweight_ptr,
    M, D, R, rows_per_split, inner_rows, stride_dz, stride_h_outer, stride_h_inner, temperature,
    PER_CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # dweight over this program's columns of h and this split's rows: a tile of [splits, R, D]
    columns = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    split = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    dweight = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    left = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    first = split * rows_per_split
    for start in range(0, rows_per_split, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        h_rows = h_ptr + (rows // inner_rows) * stride_h_outer + (rows % inner_rows) * stride_h_inner
        h = tl.load(
            h_rows[:, None] + columns[None, :], mask=(rows < M)[:, None] & (columns < D)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_D]
        dz = tl.load(
            dz_ptr + rows[None, :] * stride_dz + channels[:, None],
            mask=(rows < M)[None, :] & (channels < R)[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_M]
        dweight, left = _add_product(dz.to(h.dtype), h, dweight, left, PRECISION)

    _, rest = _gate(alpha_ptr, channels, R, temperature, PER_CHANNEL)
    tl.store(
        dweight_ptr + (split * R + channels)[:, None] * D + columns[None, :],
        rest[:, None] * dweight,
        mask=(channels < R)[:, None] & (columns < D)[None, :],
    )


def forward_config(width: int, h_bytes: int) -> dict[str, int]:
    """Tile sizes for a side width and bytes an element of h: no spills, shared memory within the chip's limit."""
    covered = block_r(width)
    block_m = 64 if h_bytes == 2 else 32
    return {
        "BLOCK_M": block_m if covered < 512 else block_m // 2,
        "BLOCK_D": 64 if h_bytes == 2 else 32 if covered < 256 else 16,
        "num_warps": 4 if covered < (256 if h_bytes == 2 else 128) else 8,  # float32 sums twice
        "num_stages": 3 if covered < 512 else 2,
    }


def weight_config(width: int, h_bytes: int) -> dict[str, int]:
    """The same for the weight gradient."""
    covered = block_r(width)
    block_m = 64 if h_bytes == 2 else 32
    return {
        "BLOCK_M": block_m if covered < 512 else block_m // 2,
        "BLOCK_D": 64 if h_bytes == 2 else 32,
        "num_warps": 4 if covered < 256 else 8,
        "num_stages": 3,
    }


def sums_config(width: int) -> dict[str, int]:
    """The same for the elementwise part of the backward pass: a tile of at most 2048 elements."""
    return {"BLOCK_M": max(1, 2048 // block_r(width)), "num_warps": 4, "num_stages": 2}


def _two_level_rows(h: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """h as outer x inner rows of neighbouring channels: h, inner rows, outer stride, inner stride.

    A batch of sequences cut from a longer tensor fits as it is; stranger strides are copied.
    """
    if h.dim() == 3 and h.stride(-1) == 1:
        return h, max(h.shape[1], 1), h.stride(0), h.stride(1)
    rows = as_rows(h)
    return rows, max(rows.shape[0], 1), 0, rows.stride(0)


def forward(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    width, depth = weight.shape
    h, inner_rows, outer_stride, inner_stride = _two_level_rows(h)
    s_rows = as_rows(s)
    count = s_rows.shape[0]
    z = torch.empty(s_rows.shape, dtype=s.dtype, device=s.device)
    if z.numel() == 0:
        return z.view(s.shape)
    config = forward_config(width, h.element_size())
    rung_fwd_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
        h,
        s_rows,
        weight.to(h.dtype).contiguous(),
        bias,
        alpha,
        z,
        count,
        depth,
        width,
        inner_rows,
        outer_stride,
        inner_stride,
        s_rows.stride(0),
        temperature,
        HAS_BIAS=bias is not None,
        PER_CHANNEL=alpha.numel() > 1,
        PRECISION=precision(),
        BLOCK_R=block_r(width),
        **config,
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
    ds, dbias, dalpha = _elementwise(g, s, z, alpha, temperature, need_ds, need_dbias)
    dweight = None if h is None else _weight(g, h, alpha, temperature)
    return None if ds is None else ds.view(dz.shape), dweight, dbias, dalpha


def _elementwise(
    g: torch.Tensor,
    s: torch.Tensor | None,
    z: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
    need_ds: bool,
    need_dbias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    count, width = g.shape
    config = sums_config(width)
    rows_per_program = config["BLOCK_M"] * max(1, triton.cdiv(count, config["BLOCK_M"] * _PROGRAMS))
    programs = triton.cdiv(count, rows_per_program)
    s_rows, z_rows = (g, g) if s is None or z is None else (as_rows(s), as_rows(z))
    ds = torch.empty(g.shape, dtype=g.dtype, device=g.device) if need_ds else None
    sums = torch.float64 if g.dtype == torch.float32 else torch.float32
    dbias = torch.empty((programs, width), dtype=sums, device=g.device) if need_dbias else None
    dalpha = torch.empty((programs, width), dtype=sums, device=g.device) if s is not None else None
    if g.numel():
        rung_bwd_kernel[(programs,)](
            g,
            s_rows,
            z_rows,
            alpha,
            ds,
            dbias,
            dalpha,
            count,
            width,
            rows_per_program,
            g.stride(0),
            s_rows.stride(0),
            z_rows.stride(0),
            temperature,
            NEED_DS=need_ds,
            NEED_DBIAS=need_dbias,
            NEED_DALPHA=s is not None,
            PER_CHANNEL=alpha.numel() > 1,
            BLOCK_R=block_r(width),
            **config,
        )
    if dbias is not None:
        dbias = dbias.sum(0).float()
    if dalpha is not None:
        dalpha = (dalpha.sum(0) if alpha.numel() > 1 else dalpha.sum().view(alpha.shape)).float()
    return ds, dbias, dalpha


def _weight(g: torch.Tensor, h: torch.Tensor, alpha: torch.Tensor, temperature: float) -> torch.Tensor:
    count, width = g.shape
    h, inner_rows, outer_stride, inner_stride = _two_level_rows(h)
    depth = h.shape[-1]
    config = weight_config(width, h.element_size())
    tiles = max(1, triton.cdiv(depth, config["BLOCK_D"]))
    splits = max(1, min(_PROGRAMS // tiles, triton.cdiv(count, 4 * config["BLOCK_M"])))
    rows_per_split = config["BLOCK_M"] * triton.cdiv(count, config["BLOCK_M"] * splits)
    partial = torch.empty((splits, width, depth), dtype=torch.float32, device=g.device)
    if partial.numel():
        rung_bwd_weight_kernel[(tiles, splits)](
            g,
            h,
            alpha,
            partial,
            count,
            depth,
            width,
            rows_per_split,
            inner_rows,
            g.stride(0),
            outer_stride,
            inner_stride,
            temperature,
            PER_CHANNEL=alpha.numel() > 1,
            PRECISION=precision(),
            BLOCK_R=block_r(width),
            **config,
        )
    return partial[0] if splits == 1 else partial.sum(0)
