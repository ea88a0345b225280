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
def feed_forward_fwd_kernel(
    h_ptr, a_ptr,
    F,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # h [M, F], of a gated one [M, 2 F], up before gate -> a [M, F], what the second layer reads
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    h_row = h_ptr + row * F * (2 if GATED else 1) + columns
    a = tl.load(h_row, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if GATED:
        a *= activate(tl.load(h_row + F, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    else:
        a = activate(a, ACTIVATION)
    tl.store(a_ptr + row * F + columns, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def feed_forward_bwd_kernel(
    h_ptr, a_ptr,
    F,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # a [M, F] comes as its gradient and becomes itself; h [M, F or 2 F] becomes its gradient
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    h_row, a_row = h_ptr + row * F * (2 if GATED else 1) + columns, a_ptr + row * F + columns
    da = tl.load(a_row, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    h = tl.load(h_row, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        g = tl.load(h_row + F, mask=mask, other=0.0).to(tl.float32)
        activated = activate(g, ACTIVATION)
        tl.store(h_row + F, (da * h * slope(g, ACTIVATION)).to(h_ptr.dtype.element_ty), mask=mask)
        dh, a = da * activated, h * activated
    else:
        dh, a = da * slope(h, ACTIVATION), activate(h, ACTIVATION)
    tl.store(h_row, dh.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(a_row, a.to(a_ptr.dtype.element_ty), mask=mask)


def config(hidden: int) -> dict[str, int]:
    """Tile size for a number of hidden channels: 8 numbers a thread, where there are as many."""
    return {"BLOCK": min(_BLOCK, max(128, triton.next_power_of_2(hidden))), "num_warps": 4, "num_stages": 1}


def forward(x: torch.Tensor, weights: Weights, activation: str) -> torch.Tensor:
    h = F.linear(as_operand(x), *_first_layer(x.dtype, weights))
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
    dy_rows, x_rows, (first, bias) = as_operand(dy), as_operand(x), _first_layer(x.dtype, weights)
    h, a = F.linear(x_rows, first, bias), dy_rows @ weights.down_weight.to(x.dtype)
    _between(feed_forward_bwd_kernel, h, a, weights, activation)
    dx = (h @ first).view(x.shape) if need_dx else None
    if not need_dweights:
        return dx, *(None,) * 6
    dup, *dgate = _halves(h.T @ x_rows, weights)
    dup_bias, *dgate_bias = _halves(h.sum(0, dtype=torch.float32), weights)
    grads = (dup, dup_bias, (dy_rows.T @ a).float(), dy_rows.sum(0, dtype=torch.float32), *dgate, *dgate_bias)
    found = zip(weights, (*grads, None, None), strict=False)
    return dx, *(None if weight is None else grad for weight, grad in found)


def _first_layer(dtype: torch.dtype, w: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (F, R) and bias (F,) of the first layer, with the gate's after them, (2 F, R) and (2 F,), in a dtype."""
    if w.gate_weight is None:
        return w.up_weight.to(dtype), None if w.up_bias is None else w.up_bias.to(dtype)
    weight = _after(w.up_weight, w.gate_weight, dtype)
    if w.up_bias is None and w.gate_bias is None:
        return weight, None
    up, gate = (weight.new_zeros(len(w.up_weight)) if bias is None else bias for bias in (w.up_bias, w.gate_bias))
    return weight, _after(up, gate, dtype)


def _after(up: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    both = torch.empty(2, *up.shape, dtype=dtype, device=up.device)
    both[0], both[1] = up, gate
    return both.flatten(0, 1)


def _halves(grad: torch.Tensor, w: Weights) -> list[torch.Tensor]:
    """In float32 what the up weight gets, and the gate's: tensors of their own, as an operator gives them."""
    halves = grad.view(1 if w.gate_weight is None else 2, len(w.up_weight), *grad.shape[1:])
    return [half.to(torch.float32, copy=True) for half in halves.unbind(0)]


def _between(kernel: triton.JITFunction, h: torch.Tensor, a: torch.Tensor, w: Weights, activation: str) -> None:
    count, hidden = a.shape
    if not a.numel():
        return
    tile = config(hidden)
    kernel[(count, triton.cdiv(hidden, tile["BLOCK"]))](
        h,
        a,
        hidden,
        GATED=w.gate_weight is not None,
        ACTIVATION=activation,
        **tile,
    )
