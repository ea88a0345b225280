"""A narrow feed-forward on the GPU: PyTorch's products (cuBLAS), and what lies between them in one pass of Triton's.

The backward pass computes the hidden channels once more. One kernel for all of it, with hidden tiles in no memory, was
measured on an H200 and was slower at every width but the narrowest: 2 x forward and 10 x backward at R = 256.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .._rows import as_operand
from .._triton import activate, slope
from .weights import Weights

_BLOCK = 1024


@triton.jit
def _hidden_of(ptr, bias_ptr, columns, mask, HAS_BIAS: tl.constexpr):
    x = tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def feed_forward_fwd_kernel(
    h_ptr, up_bias_ptr, gate_bias_ptr, a_ptr,
    F,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # h [M, F], of a gated one [M, 2 F], up before gate -> a [M, F], what the second layer reads
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    h_row = h_ptr + row * F * (2 if GATED else 1)
    a = _hidden_of(h_row, up_bias_ptr, columns, mask, HAS_UP_BIAS)
    if GATED:
        a *= activate(_hidden_of(h_row + F, gate_bias_ptr, columns, mask, HAS_GATE_BIAS), ACTIVATION)
    else:
        a = activate(a, ACTIVATION)
    tl.store(a_ptr + row * F + columns, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def feed_forward_bwd_kernel(
    h_ptr, up_bias_ptr, gate_bias_ptr, a_ptr,
    F,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # a [M, F] comes as its gradient and becomes itself; h [M, F or 2 F] becomes its gradient
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    h_row, a_row = h_ptr + row * F * (2 if GATED else 1), a_ptr + row * F + columns
    da = tl.load(a_row, mask=mask, other=0.0).to(tl.float32)
    h = _hidden_of(h_row, up_bias_ptr, columns, mask, HAS_UP_BIAS)
    if GATED:
        g = _hidden_of(h_row + F, gate_bias_ptr, columns, mask, HAS_GATE_BIAS)
        activated = activate(g, ACTIVATION)
        tl.store(h_row + F + columns, (da * h * slope(g, ACTIVATION)).to(h_ptr.dtype.element_ty), mask=mask)
        dh, a = da * activated, h * activated
    else:
        dh, a = da * slope(h, ACTIVATION), activate(h, ACTIVATION)
    tl.store(h_row + columns, dh.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(a_row, a.to(a_ptr.dtype.element_ty), mask=mask)


def config(hidden: int) -> dict[str, int]:
    """Tile size for a number of hidden channels: 8 numbers a thread, where there are as many."""
    return {"BLOCK": min(_BLOCK, max(128, triton.next_power_of_2(hidden))), "num_warps": 4, "num_stages": 1}


def forward(x: torch.Tensor, weights: Weights, activation: str) -> torch.Tensor:
    x_rows = as_operand(x)
    h = x_rows @ _first_of(x.dtype, weights).T
    a = torch.empty(len(h), len(weights.up_weight), dtype=x.dtype, device=x.device)
    _between(feed_forward_fwd_kernel, h, a, weights, activation)
    bias = None if weights.down_bias is None else weights.down_bias.to(x.dtype)
    return F.linear(a, weights.down_weight.to(x.dtype), bias).view(x.shape)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    activation: str,
    need_dx: bool,
    need_dweights: bool,
) -> tuple[torch.Tensor | None, ...]:
    """dx in the dtype of x, and in float32 what each weight and bias gets; None for those that are not wanted."""
    dy_rows, x_rows, first = as_operand(dy), as_operand(x), _first_of(x.dtype, weights)
    h, a = x_rows @ first.T, dy_rows @ weights.down_weight.to(x.dtype)
    _between(feed_forward_bwd_kernel, h, a, weights, activation)
    dx = (h @ first).view(x.shape) if need_dx else None
    if not need_dweights:
        return dx, *(None,) * 6
    dup, *dgate = (h.T @ x_rows).float().split(len(weights.up_weight))
    dup_bias, *dgate_bias = h.sum(0, dtype=torch.float32).split(len(weights.up_weight))
    grads = (dup, dup_bias, (dy_rows.T @ a).float(), dy_rows.sum(0, dtype=torch.float32), *dgate, *dgate_bias)
    found = zip(weights, (*grads, None, None), strict=False)
    return dx, *(None if weight is None else grad for weight, grad in found)


def _first_of(dtype: torch.dtype, w: Weights) -> torch.Tensor:
    """The weights of the first layer, (F, R), or (2 F, R) with the gate's after them, in a dtype."""
    if w.gate_weight is None:
        return w.up_weight.to(dtype)
    both = torch.empty(2, *w.up_weight.shape, dtype=dtype, device=w.up_weight.device)
    both[0], both[1] = w.up_weight, w.gate_weight
    return both.flatten(0, 1)


def _between(kernel: triton.JITFunction, h: torch.Tensor, a: torch.Tensor, w: Weights, activation: str) -> None:
    count, hidden = a.shape
    if not a.numel():
        return
    tile = config(hidden)
    kernel[(count, triton.cdiv(hidden, tile["BLOCK"]))](
        h,
        w.up_bias,
        w.gate_bias,
        a,
        hidden,
        HAS_UP_BIAS=w.up_bias is not None,
        HAS_GATE_BIAS=w.gate_bias is not None,
        GATED=w.gate_weight is not None,
        ACTIVATION=activation,
        **tile,
    )
