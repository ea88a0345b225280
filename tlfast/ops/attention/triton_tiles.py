"""What both passes of attention in Triton share: rows of a head, which keys a query sees, a kernel's arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .._triton import block_r, precision

# Integers a kernel is not compiled anew for; what decides how wide loads are, UNIT and HEAD_DIM, are constants.
NOT_SPECIALISED = ("H", "Sq", "Sk", "threshold", *(f"stride_{x}{of}" for x in "qkv" for of in "bsh"))
_TINY = 1e-30  # stands in for a scale of 0, with which -inf, an excluded key's score, would become NaN


@triton.jit
def rows_of(ptr, rows, inside, stride, UNIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # a stride counts UNITs of elements: the compiler sees that rows are aligned
    channels = tl.arange(0, BLOCK_D)
    at = ptr + (rows.to(tl.int64) * stride * UNIT)[:, None] + channels[None, :]
    return tl.load(at, mask=inside[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)  # [rows, BLOCK_D]


@triton.jit
def store_rows(ptr, x, rows, limit, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    # of a contiguous tensor, whose rows are multiples of HEAD_DIM apart
    channels = tl.arange(0, BLOCK_D)
    at = ptr + (rows.to(tl.int64) * stride * HEAD_DIM)[:, None] + channels[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < limit)[:, None] & (channels < HEAD_DIM)[None, :])


@triton.jit
def head_of(ptr, head, H, stride_b, stride_h, UNIT: tl.constexpr):
    # where head `head` of the B H heads begins
    return ptr + ((head // H).to(tl.int64) * stride_b + (head % H).to(tl.int64) * stride_h) * UNIT


@triton.jit
def allowed_keys(key_mask_ptr, head, H, Sk, keys, HAS_MASK: tl.constexpr):
    inside = keys < Sk  # [BLOCK_N]
    if HAS_MASK:
        inside &= tl.load(key_mask_ptr + (head // H).to(tl.int64) * Sk + keys, mask=inside, other=0) != 0
    return inside


@triton.jit
def visible(s, rows, keys, allowed, offset, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, CUT: tl.constexpr):
    # scores with -inf for excluded keys; CUT: the tile may lie on the diagonal or reach past the last key
    if CUT and CAUSAL:
        s = tl.where(allowed[None, :] & (keys[None, :] <= rows[:, None] + offset), s, float("-inf"))
    elif CUT or HAS_MASK:
        s = tl.where(allowed[None, :], s, float("-inf"))
    return s  # [BLOCK_M, BLOCK_N]


@triton.jit
def exponentials(s, scale_log2, largest):
    # rounded once, whatever the compiler would fuse: in the backward pass as in the forward
    return tl.exp2(tl.fma(s, scale_log2, -largest))


@triton.jit
def ends(block, Sq, Sk, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # keys that all of the block's queries see, in whole tiles, and keys that any of them sees
    every, some = Sk, Sk
    if CAUSAL:
        first_hidden = block * BLOCK_M + 1 + Sk - Sq  # from the first query
        every = tl.minimum(tl.maximum(first_hidden, 0), Sk)
        some = tl.minimum(tl.maximum(first_hidden + BLOCK_M - 1, 0), Sk)
    return every // BLOCK_N * BLOCK_N, some


def float32_config(head_dim: int) -> dict[str, int]:
    """Small tiles: without tensor cores, both factors of a product are in registers."""
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4 if head_dim <= 32 else 8, "num_stages": 2}


class Arguments:
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
