"""The gradients of attention in Triton: one kernel for the queries', one for those of keys and values (triton.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import dropout_keeps, dropout_row_keys
from .triton_tiles import (
    NOT_SPECIALISED,
    Arguments,
    allowed_keys,
    ends,
    exponentials,
    float32_config,
    head_of,
    rows_of,
    store_rows,
    visible,
)


@triton.jit
def _gather_dq(
    dq, delta, q, dout, rows, row_keys, largest, start, end, k_ptr, v_ptr, key_mask_ptr, head,
    H, Sq, Sk, stride_ks, stride_vs, scale_log2, threshold,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, CUT: tl.constexpr, PRECISION: tl.constexpr,
    UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        allowed = allowed_keys(key_mask_ptr, head, H, Sk, keys, HAS_MASK)
        k = rows_of(k_ptr, keys, allowed, stride_ks, UNIT, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = rows_of(v_ptr, keys, allowed, stride_vs, UNIT, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        s = visible(s, rows, keys, allowed, Sk - Sq, CAUSAL, HAS_MASK, CUT)
        p = exponentials(s, scale_log2, largest[:, None])  # 1/sum is the same along a row: left to the end
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
    q_ptr = head_of(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    k_ptr = head_of(k_ptr, head, H, stride_kb, stride_kh, UNIT)
    v_ptr = head_of(v_ptr, head, H, stride_vb, stride_vh, UNIT)
    q = rows_of(q_ptr, rows, rows < Sq, stride_qs, UNIT, HEAD_DIM, BLOCK_D)
    dout = rows_of(head_of(dout_ptr, head, H, Sq * H, 1, HEAD_DIM), rows, rows < Sq, H, HEAD_DIM, HEAD_DIM, BLOCK_D)
    out = rows_of(head_of(out_ptr, head, H, Sq * H, 1, HEAD_DIM), rows, rows < Sq, H, HEAD_DIM, HEAD_DIM, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1) * kept_share  # [BLOCK_M]
    tl.store(delta_ptr + at, delta, mask=rows < Sq)
    largest = tl.load(statistics_ptr + 2 * at, mask=rows < Sq, other=0.0)
    row_keys = at
    if DROPOUT:
        row_keys = dropout_row_keys(tl.load(seed_ptr), at)
        tl.store(row_keys_ptr + at, row_keys.to(tl.int32, bitcast=True), mask=rows < Sq)

    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    every, some = ends(block, Sq, Sk, CAUSAL, BLOCK_M, BLOCK_N)
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
    store_rows(head_of(dq_ptr, head, H, Sq * H, 1, HEAD_DIM), dq, rows, Sq, H, HEAD_DIM, BLOCK_D)


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
        q = rows_of(q_ptr, rows, rows < Sq, stride_qs, UNIT, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = rows_of(dout_ptr, rows, rows < Sq, H, HEAD_DIM, HEAD_DIM, BLOCK_D)
        largest = tl.load(statistics_ptr + 2 * at, mask=rows < Sq, other=0.0)  # [BLOCK_M]
        reciprocal = tl.load(statistics_ptr + 2 * at + 1, mask=rows < Sq, other=0.0)
        delta = tl.load(delta_ptr + at, mask=rows < Sq, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if CUT:
            s = tl.where(keys[:, None] <= rows[None, :] + (Sk - Sq), s, float("-inf"))
        p = exponentials(s, scale_log2, largest[None, :]) * reciprocal[None, :]
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
    allowed = allowed_keys(key_mask_ptr, head, H, Sk, keys, HAS_MASK)
    q_ptr = head_of(q_ptr, head, H, stride_qb, stride_qh, UNIT)
    dout_ptr = head_of(dout_ptr, head, H, Sq * H, 1, HEAD_DIM)
    k_ptr = head_of(k_ptr, head, H, stride_kb, stride_kh, UNIT)
    v_ptr = head_of(v_ptr, head, H, stride_vb, stride_vh, UNIT)
    k = rows_of(k_ptr, keys, allowed, stride_ks, UNIT, HEAD_DIM, BLOCK_D)
    v = rows_of(v_ptr, keys, allowed, stride_vs, UNIT, HEAD_DIM, BLOCK_D)

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
    store_rows(head_of(dk_ptr, head, H, Sk * H, 1, HEAD_DIM), dk, keys, Sk, H, HEAD_DIM, BLOCK_D)
    store_rows(head_of(dv_ptr, head, H, Sk * H, 1, HEAD_DIM), dv, keys, Sk, H, HEAD_DIM, BLOCK_D)


def dq_config(head_dim: int, element_bytes: int) -> dict[str, int]:
    """Tile sizes of the queries' gradient, as triton.forward_config's."""
    if element_bytes == 4:
        return float32_config(head_dim)
    if head_dim <= 32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def dkv_config(head_dim: int, element_bytes: int) -> dict[str, int]:
    """The same for the gradients of keys and values, whose programs hold BLOCK_N keys."""
    if element_bytes == 4:
        return float32_config(head_dim)
    return {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 2}


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
    given = Arguments(q, k, v, key_mask, causal, scale, dropout_p, seed)
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
