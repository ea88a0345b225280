"""What the Triton kernels of several operations share; importing it imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
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
def slope(x, ACTIVATION: tl.constexpr):
    # the derivative of activate
    if ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        s = tl.sigmoid(u)  # 1 - s would lose digits where s is near 1
        d = s + x * s * tl.sigmoid(-u) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        d = s + 1.702 * x * s * (1.0 - s)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        d = s + x * s * (1.0 - s)
    elif ACTIVATION == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    return d


@triton.jit
def dropout_row_keys(seed, rows):
    # the hash of tlfast.ops.dropout: one uint32 a row, from the int64 seed and int64 row numbers
    x = seed.to(tl.uint64) + (rows + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)).to(tl.uint32)


@triton.jit
def dropout_keeps(row_keys, columns, threshold):
    # which entries are kept; shapes broadcast; the threshold: int(p 2^32), its 32 bits as an int32
    x = columns.to(tl.uint32) * 0x9E3779B9 + row_keys
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)) >= threshold.to(tl.uint32)


def block_r(width: int) -> int:
    """Channels a program covers: the side width rounded up to a power of two, at least a tensor core's 16."""
    return max(16, triton.next_power_of_2(width))


def precision() -> str:
    """ "tf32" or "ieee": float32 products follow PyTorch's own switch; half-precision ones do not look at it."""
    switch = torch.backends.cuda.matmul
    if hasattr(switch, "fp32_precision"):  # since PyTorch 2.9, which refuses to read the older name beside it
        return "tf32" if switch.fp32_precision == "tf32" else "ieee"
    return "tf32" if switch.allow_tf32 else "ieee"
