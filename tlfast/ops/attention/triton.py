"""Attention on the GPU in Triton, for narrow heads: a program holds some queries, or keys, of one head.

Forward, and dq: a program walks along the keys that its queries see. dk and dv: along the queries that see its keys.
The map exists a tile at a time, in registers; nothing is added by atomics, so the result has the same bits every time.
Tiles that the diagonal or the last key cuts are walked apart: in the others no comparison is spent on a score.

Kept: out, and for each row the largest score times log2(e), as exponentials are computed in base 2, and 1/sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._triton import block_r, dropout_keeps, dropout_row_keys, precision

# Integers a kernel is not compiled anew for; what decides how wide loads are, UNIT and HEAD_DIM, are constants.
NOT_SPECIALISED = ("H", "Sq", "Sk", "threshold", *(f"stride_{x}{of}" for x in "qkv" for of in "bsh"))
_TINY = 1e-30  # stands in for a scale of 0, with which -inf, an excluded key's score, would become NaN


@triton.jit
def _rows(ptr, rows, inside, stride, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # a stride counts UNITs of elements: the compiler sees that rows are aligned
    channels = tl.arange(0, BLOCK_D)
    at = ptr + (rows.to(tl.int64) * stride * UNIT)[:, None] + channels[None, :]
    return tl.load(at, mask=inside[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)  # [rows, BLOCK_D]


@triton.jit
def _store_rows(ptr, x, rows, limit, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # of a contiguous tensor, whose rows are multiples of HEAD_DIM apart
    channels = tl.arange(0, BLOCK_D)
    at = ptr + (rows.to(tl.int64) * stride * HEAD_DIM)[:, None] + channels[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < limit)[:, None] & (channels < HEAD_DIM)[None, :])


@triton.jit
def _head(ptr, head, H, stride_b, stride_h, UNIT: tl.constexpr):
    # where head `head` of the B H heads begins
    return ptr + ((head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h) * UNIT


@triton.jit
def _allowed(key_mask_ptr, head, H, Sk, keys, HAS_MASK: tl.constexpr):
    inside = keys < Sk  # [BLOCK_N]
    if HAS_MASK:
        inside &= tl.load(key_mask_ptr + (head // H).to(tl.int64) * Sk + keys, mask=inside, other=0) != 0
    return inside


@triton.jit
def _visible(s, rows, keys, allowed, offset, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, CUT: tl.constexpr):
    # scores with -inf for excluded keys; CUT: the tile may lie on the diagonal or reach past the last key
    if CUT and CAUSAL:
        s = tl.where(allowed[None, :] & (keys[None, :] <= rows[:, None] + offset), s, float("-inf"))
    elif CUT or HAS_MASK:
        s = tl.where(allowed[None, :], s, float("-inf"))
    return s  # [BLOCK_M, BLOCK_N]


@triton.jit
def _exponentials(s, scale_log2, largest):
    # rounded once, whatever the compiler would fuse: in the backward pass as in the forward
    return tl.exp2(tl.fma(s, scale_log2, -largest))


@triton.jit
def _ends(block, Sq, Sk, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # keys that all of the block's queries see, in whole tiles, and keys that any of them sees
    every, some = Sk, Sk
    if CAUSAL:
        first_hidden = block * BLOCK_M + 1 + Sk - Sq  # from the first query
        every = tl.minimum(tl.maximum(first_hidden, 0), Sk)
        some = tl.minimum(tl.maximum(first_hidden + BLOCK_M - 1, 0), Sk)
    return every // BLOCK_N * BLOCK_N, some


@triton.jit
def _attend(
    out, total, largest, q, rows, row_keys, start, end, k_ptr, v_ptr, key_mask_ptr, head,
    H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        allowed = _allowed(key_mask_ptr, head, H, Sk, keys, HAS_MASK)
        k = _rows(k_ptr, keys, allowed, stride_ks, UNIT, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        s = _visible(s, rows, keys, allowed, Sk - Sq, CAUSAL, HAS_MASK, CUT)
        next_largest = tl.maximum(largest, tl.max(s, axis=1) * scale_log2)  # [BLOCK_M]
        shift = tl.where(next_largest == float("-inf"), 0.0, next_largest)  # exp2(-inf - 0) is 0, not NaN
        p = _exponentials(s, scale_log2, shift[:, None])
        rescale = tl.exp2(largest - shift)
        total = total * rescale + tl.sum(p, axis=1)
        if DROPOUT:
            p = tl.where(dropout_keeps(row_keys[:, None], keys[None, :], threshold), p, 0.0)
        v = _rows(v_ptr, keys, allowed, stride_vs, UNIT, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        out = tl.dot(p.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
        largest = next_largest
    return out, total, largest


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, statistics_ptr,
    H, Sq, Sk, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale_log2, threshold, kept_share,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # with a diagonal, the longest walks come first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * Sq + rows  # [BLOCK_M]
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh, UNIT)
    q = _rows(q_ptr, rows, rows < Sq, stride_qs, UNIT, HEAD_DIM, BLOCK_D)
    row_keys = at
    if DROPOUT:
        row_keys = dropout_row_keys(tl.load(seed_ptr), at)

    out = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    every, some = _ends(block, Sq, Sk, CAUSAL, BLOCK_M, BLOCK_N)
    out, total, largest = _attend(
        out, total, largest, q, rows, row_keys, 0, every, k_ptr, v_ptr, key_mask_ptr, head,
        H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
        CAUSAL, HAS_MASK, DROPOUT, False, PRECISION, UNIT, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    out, total, largest = _attend(
        out, total, largest, q, rows, row_keys, every, some, k_ptr, v_ptr, key_mask_ptr, head,
        H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
        CAUSAL, HAS_MASK, DROPOUT, True, PRECISION, UNIT, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    sees_a_key = total != 0.0
    reciprocal = tl.where(sees_a_key, 1.0 / tl.where(sees_a_key, total, 1.0), 0.0)
    tl.store(statistics_ptr + 2 * at, tl.where(sees_a_key, largest, 0.0), mask=rows < Sq)
    tl.store(statistics_ptr + 2 * at + 1, reciprocal, mask=rows < Sq)
    out *= (reciprocal / kept_share)[:, None]
    out_ptr = _head(out_ptr, head, H, Sq * H, 1, HEAD_DIM)
    _store_rows(out_ptr, out, rows, Sq, H, HEAD_DIM, BLOCK_D)


@triton.jit
def _gather_dq(
    dq, delta, q, dout, rows, row_keys, largest, start, end, k_ptr, v_ptr, key_mask_ptr, head,
    H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        allowed = _allowed(key_mask_ptr, head, H, Sk, keys, HAS_MASK)
        k = _rows(k_ptr, keys, allowed, stride_ks, UNIT, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = _rows(v_ptr, keys, allowed, stride_vs, UNIT, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        s = _visible(s, rows, keys, allowed, Sk - Sq, CAUSAL, HAS_MASK, CUT)
        p = _exponentials(s, scale_log2, largest[:, None])  # 1/sum is the same along a row: left to the end
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(dropout_keeps(row_keys[:, None], keys[None, :], threshold), dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attention_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, statistics_ptr, delta_ptr, row_keys_ptr, dq_ptr,
    H, Sq, Sk, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale, scale_log2, threshold, kept_share,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # dq, and for the kernel of dk and dv: delta, the sum of dout * out of a row, times the share that dropout keeps,
    # and the row's part of dropout's hash, as long to compute as that of some twenty entries
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    at = head.to(tl.int64) * Sq + rows  # [BLOCK_M]
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh, UNIT)
    q = _rows(q_ptr, rows, rows < Sq, stride_qs, UNIT, HEAD_DIM, BLOCK_D)
    dout = _rows(_head(dout_ptr, head, H, Sq * H, 1, HEAD_DIM), rows, rows < Sq, H, HEAD_DIM, HEAD_DIM, BLOCK_D)
    out = _rows(_head(out_ptr, head, H, Sq * H, 1, HEAD_DIM), rows, rows < Sq, H, HEAD_DIM, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1) * kept_share  # [BLOCK_M]
    tl.store(delta_ptr + at, delta, mask=rows < Sq)
    largest = tl.load(statistics_ptr + 2 * at, mask=rows < Sq, other=0.0)
    row_keys = at
    if DROPOUT:
        row_keys = dropout_row_keys(tl.load(seed_ptr), at)
        tl.store(row_keys_ptr + at, row_keys.to(tl.int32, bitcast=True), mask=rows < Sq)

    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    every, some = _ends(block, Sq, Sk, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _gather_dq(
        dq, delta, q, dout, rows, row_keys, largest, 0, every, k_ptr, v_ptr, key_mask_ptr, head,
        H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
        CAUSAL, HAS_MASK, DROPOUT, False, PRECISION, UNIT, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    dq = _gather_dq(
        dq, delta, q, dout, rows, row_keys, largest, every, some, k_ptr, v_ptr, key_mask_ptr, head,
        H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
        CAUSAL, HAS_MASK, DROPOUT, True, PRECISION, UNIT, HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    reciprocal = tl.load(statistics_ptr + 2 * at + 1, mask=rows < Sq, other=0.0)
    dq *= (reciprocal * (scale / kept_share))[:, None]
    _store_rows(_head(dq_ptr, head, H, Sq * H, 1, HEAD_DIM), dq, rows, Sq, H, HEAD_DIM, BLOCK_D)


@triton.jit
def _gather_dkv(
    dk, dv, k, v, keys, start, end, dout_ptr, q_ptr, statistics_ptr, delta_ptr, row_keys_ptr, head,
    H, Sq, Sk, stride_qs, scale_log2, threshold,
    DROPOUT: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # a query past the last has 1/sum = 0; a key past the last, or masked, spoils its own row alone, which is not used
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        at = head.to(tl.int64) * Sq + rows
        q = _rows(q_ptr, rows, rows < Sq, stride_qs, UNIT, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = _rows(dout_ptr, rows, rows < Sq, H, HEAD_DIM, HEAD_DIM, BLOCK_D)
        largest = tl.load(statistics_ptr + 2 * at, mask=rows < Sq, other=0.0)  # [BLOCK_M]
        reciprocal = tl.load(statistics_ptr + 2 * at + 1, mask=rows < Sq, other=0.0)
        delta = tl.load(delta_ptr + at, mask=rows < Sq, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if CUT:
            s = tl.where(keys[:, None] <= rows[None, :] + (Sk - Sq), s, float("-inf"))
        p = _exponentials(s, scale_log2, largest[None, :]) * reciprocal[None, :]
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if DROPOUT:
            row_keys = tl.load(row_keys_ptr + at, mask=rows < Sq, other=0).to(tl.uint32, bitcast=True)
            keep = dropout_keeps(row_keys[None, :], keys[:, None], threshold)
            dp = tl.where(keep, dp, 0.0)
            dv = tl.dot(tl.where(keep, p, 0.0).to(dout.dtype), dout, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attention_bwd_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, statistics_ptr, delta_ptr, row_keys_ptr, dk_ptr, dv_ptr,
    H, Sq, Sk, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    scale, scale_log2, threshold, kept_share,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, block = tl.program_id(0), tl.program_id(1)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    allowed = _allowed(key_mask_ptr, head, H, Sk, keys, HAS_MASK)
    q_ptr = _head(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    dout_ptr = _head(dout_ptr, head, H, Sq * H, 1, HEAD_DIM)
    k_ptr = _head(k_ptr, head, H, stride_kb, stride_kh, UNIT)
    v_ptr = _head(v_ptr, head, H, stride_vb, stride_vh, UNIT)
    k = _rows(k_ptr, keys, allowed, stride_ks, UNIT, HEAD_DIM, BLOCK_D)
    v = _rows(v_ptr, keys, allowed, stride_vs, UNIT, HEAD_DIM, BLOCK_D)

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    seen_by_all = 0
    if CAUSAL:
        first_seeing = block * BLOCK_N - (Sk - Sq)  # the query on the diagonal of the first key
        seen_by_all = tl.cdiv(tl.maximum(first_seeing + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
        dk, dv = _gather_dkv(
            dk, dv, k, v, keys, tl.maximum(first_seeing, 0) // BLOCK_M * BLOCK_M, tl.minimum(seen_by_all, Sq),
            dout_ptr, q_ptr, statistics_ptr, delta_ptr, row_keys_ptr, head, H, Sq, Sk, stride_qs, scale_log2, threshold,
            DROPOUT, True, PRECISION, UNIT, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    dk, dv = _gather_dkv(
        dk, dv, k, v, keys, seen_by_all, Sq,
        dout_ptr, q_ptr, statistics_ptr, delta_ptr, row_keys_ptr, head, H, Sq, Sk, stride_qs, scale_log2, threshold,
        DROPOUT, False, PRECISION, UNIT, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    dk = tl.where(allowed[:, None], dk * (scale / kept_share), 0.0)
    dv = tl.where(allowed[:, None], dv / kept_share, 0.0)
    _store_rows(_head(dk_ptr, head, H, Sk * H, 1, HEAD_DIM), dk, keys, Sk, H, HEAD_DIM, BLOCK_D)
    _store_rows(_head(dv_ptr, head, H, Sk * H, 1, HEAD_DIM), dv, keys, Sk, H, HEAD_DIM, BLOCK_D)


def forward_config(head_dim: int, element_bytes: int) -> dict[str, int]:
    """Tile sizes for a head's channels and bytes an element: no spills, but for a few bytes where mask, dropout and
    diagonal come together. 64 x 64 takes 0.94 of the time on an H200 at 8 channels, and spills on capability 8.0."""
    if element_bytes == 4:
        return _float32_config(head_dim)
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 3}


def dq_config(head_dim: int, element_bytes: int) -> dict[str, int]:
    """The same for the gradient of the queries."""
    if element_bytes == 4:
        return _float32_config(head_dim)
    if head_dim <= 32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def dkv_config(head_dim: int, element_bytes: int) -> dict[str, int]:
    """The same for the gradients of keys and values, whose programs hold BLOCK_N keys."""
    if element_bytes == 4:
        return _float32_config(head_dim)
    return {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 2}


def _float32_config(head_dim: int) -> dict[str, int]:
    """Small tiles: without tensor cores, both factors of a product are in registers."""
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 2}


class _Arguments:
    """Inputs as the kernels take them: what all three have in common."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
        seed: torch.Tensor | None,
    ) -> None:
        self.batch, self.queries, self.heads, self.head_dim = q.shape
        self.keys, self.element_bytes = k.shape[1], q.element_size()
        inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
        strides = [stride for x in inputs for stride in x.stride()[:3]]
        unit = math.gcd(16 // self.element_bytes, *strides)
        self.scale = max(scale, _TINY)
        self.inputs = (*inputs, None if key_mask is None else key_mask.contiguous().view(torch.uint8))
        self.seed = None if seed is None else _on_device(seed, q.device)
        self.sizes = (self.heads, self.queries, self.keys, *(stride // unit for stride in strides))
        self.dropout = (_signed_32(int(dropout_p * 2**32)), 1.0 - dropout_p)
        self.constants: dict[str, Any] = {
            "CAUSAL": causal,
            "HAS_MASK": key_mask is not None,
            "DROPOUT": seed is not None,
            "PRECISION": precision(),
            "UNIT": unit,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_r(self.head_dim),
        }

    @property
    def scale_log2(self) -> float:
        return self.scale * math.log2(math.e)


def _on_device(seed: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The seed where a kernel can read it, without waiting for the device; one that is there is not read here."""
    return seed if seed.device == device else torch.full((), int(seed.item()), dtype=torch.int64, device=device)


def _signed_32(x: int) -> int:
    """The int32 of the same bits: a kernel's argument has one type then, whatever its value."""
    return x - 2**32 if x >= 2**31 else x


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if scale < 0:  # the kernels look for the largest product, which is then that of the largest score
        q, scale = -q, -scale
    given = _Arguments(q, k, v, key_mask, causal, scale, dropout_p, seed)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty((given.batch, given.heads, given.queries, 2), dtype=torch.float32, device=q.device)
    if out.numel():
        config = forward_config(given.head_dim, given.element_bytes)
        attention_fwd_kernel[(given.batch * given.heads, triton.cdiv(given.queries, config["BLOCK_M"]))](
            *given.inputs,
            given.seed,
            out,
            statistics,
            *given.sizes,
            given.scale_log2,
            *given.dropout,
            **given.constants,
            **config,
        )
    return out, statistics


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    if scale < 0:
        dq, dk, dv, _ = backward(
            dout, -q, k, v, bias, key_mask, out, statistics, causal, -scale, dropout_p, seed, need_dbias
        )
        return -dq, dk, dv, None
    given = _Arguments(q, k, v, key_mask, causal, scale, dropout_p, seed)
    dout = dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rows = (given.batch, given.heads, given.queries)
    delta = torch.empty(rows, dtype=torch.float32, device=q.device)
    row_keys = None if seed is None else torch.empty(rows, dtype=torch.int32, device=q.device)
    common = (*given.sizes, scale, given.scale_log2, *given.dropout)
    if dq.numel():
        config = dq_config(given.head_dim, given.element_bytes)
        attention_bwd_dq_kernel[(given.batch * given.heads, triton.cdiv(given.queries, config["BLOCK_M"]))](
            dout, *given.inputs, given.seed, out, statistics, delta, row_keys, dq, *common, **given.constants, **config
        )
    if dk.numel():
        config = dkv_config(given.head_dim, given.element_bytes)
        attention_bwd_dkv_kernel[(given.batch * given.heads, triton.cdiv(given.keys, config["BLOCK_N"]))](
            dout, *given.inputs, statistics, delta, row_keys, dk, dv, *common, **given.constants, **config
        )
    return dq, dk, dv, None
