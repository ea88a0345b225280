"""A narrow feed-forward on the GPU in Triton: what lies between its layers exists a tile at a time, in no memory.

A program holds every channel of its rows (BLOCK_R covers R) and walks along the hidden channels, BLOCK_F at a time; the
weights come through shared memory. The backward pass computes the hidden tiles once more. Sums over tokens are written
apart and added by torch in a fixed order: the result has the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .._rows import as_rows
from .._triton import activate, block_r, precision, slope
from .weights import Weights

# Programs the weights' gradient aims at, one for each multiprocessor of a large GPU: each writes a whole partial sum.
_PROGRAMS = 132


@triton.jit
def _rows_of(ptr, rows, channels, M, R, stride):
    mask = (rows < M)[:, None] & (channels < R)[None, :]
    return tl.load(ptr + rows[:, None] * stride + channels[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_R]


@triton.jit
def _weight_of(ptr, hidden, channels, F, R, stride_hidden, stride_channel):
    mask = (hidden < F)[:, None] & (channels < R)[None, :]
    at = ptr + hidden[:, None] * stride_hidden + channels[None, :] * stride_channel
    return tl.load(at, mask=mask, other=0.0)  # [BLOCK_F, BLOCK_R]


@triton.jit
def _bias_of(ptr, channels, count, HAS_BIAS: tl.constexpr):
    bias = tl.zeros(channels.shape, dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(ptr + channels, mask=channels < count, other=0.0).to(tl.float32)
    return bias


@triton.jit
def feed_forward_fwd_kernel(
    x_ptr, up_ptr, up_bias_ptr, gate_ptr, gate_bias_ptr, down_ptr, down_bias_ptr, y_ptr,
    M, R, F, stride_x,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    channels = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    x = _rows_of(x_ptr, rows, channels, M, R, stride_x)  # [BLOCK_M, BLOCK_R]
    y = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        hidden = start + tl.arange(0, BLOCK_F)  # [BLOCK_F]
        up = _weight_of(up_ptr, hidden, channels, F, R, R, 1)
        h = tl.dot(x, tl.trans(up), input_precision=PRECISION)  # [BLOCK_M, BLOCK_F]
        h += _bias_of(up_bias_ptr, hidden, F, HAS_UP_BIAS)[None, :]
        if GATED:
            gate = _weight_of(gate_ptr, hidden, channels, F, R, R, 1)
            g = tl.dot(x, tl.trans(gate), input_precision=PRECISION)
            h *= activate(g + _bias_of(gate_bias_ptr, hidden, F, HAS_GATE_BIAS)[None, :], ACTIVATION)
        else:
            h = activate(h, ACTIVATION)
        down = _weight_of(down_ptr, hidden, channels, F, R, 1, F)
        y = tl.dot(h.to(x.dtype), down, y, input_precision=PRECISION)
    y += _bias_of(down_bias_ptr, channels, R, HAS_DOWN_BIAS)[None, :]
    mask = (rows < M)[:, None] & (channels < R)[None, :]
    tl.store(y_ptr + rows[:, None] * R + channels[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def feed_forward_bwd_kernel(
    dy_ptr, x_ptr, up_ptr, up_bias_ptr, gate_ptr, gate_bias_ptr, down_ptr, dx_ptr,
    M, R, F, stride_dy, stride_x,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    channels = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    x = _rows_of(x_ptr, rows, channels, M, R, stride_x)  # [BLOCK_M, BLOCK_R]
    dy = _rows_of(dy_ptr, rows, channels, M, R, stride_dy)
    dx = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        hidden = start + tl.arange(0, BLOCK_F)  # [BLOCK_F]
        up = _weight_of(up_ptr, hidden, channels, F, R, R, 1)  # [BLOCK_F, BLOCK_R]
        h = tl.dot(x, tl.trans(up), input_precision=PRECISION)  # [BLOCK_M, BLOCK_F]
        h += _bias_of(up_bias_ptr, hidden, F, HAS_UP_BIAS)[None, :]
        down = _weight_of(down_ptr, hidden, channels, F, R, 1, F)
        dh = tl.dot(dy, tl.trans(down), input_precision=PRECISION)
        if GATED:
            gate = _weight_of(gate_ptr, hidden, channels, F, R, R, 1)
            g = tl.dot(x, tl.trans(gate), input_precision=PRECISION)
            g += _bias_of(gate_bias_ptr, hidden, F, HAS_GATE_BIAS)[None, :]
            dg = dh * h * slope(g, ACTIVATION)
            dx = tl.dot(dg.to(x.dtype), gate, dx, input_precision=PRECISION)
            dh *= activate(g, ACTIVATION)
        else:
            dh *= slope(h, ACTIVATION)
        dx = tl.dot(dh.to(x.dtype), up, dx, input_precision=PRECISION)
    mask = (rows < M)[:, None] & (channels < R)[None, :]
    tl.store(dx_ptr + rows[:, None] * R + channels[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def feed_forward_bwd_weight_kernel(
    dy_ptr, x_ptr, up_ptr, up_bias_ptr, gate_ptr, gate_bias_ptr, down_ptr,
    dup_ptr, dup_bias_ptr, dgate_ptr, dgate_bias_ptr, ddown_ptr, ddown_bias_ptr,
    M, R, F, rows_per_split, stride_dy, stride_x,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # this split's rows' share of the gradients of BLOCK_F hidden channels: tiles of [splits, F, R] and [splits, R, F];
    # hidden tiles stand on their side, so that their products with x and dy read them as they were computed
    hidden = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)  # [BLOCK_F]
    split = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    up = _weight_of(up_ptr, hidden, channels, F, R, R, 1)  # [BLOCK_F, BLOCK_R]
    down = _weight_of(down_ptr, hidden, channels, F, R, 1, F)
    up_bias = _bias_of(up_bias_ptr, hidden, F, HAS_UP_BIAS)[:, None]
    dup = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    ddown = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
    dup_bias = tl.zeros((BLOCK_F,), dtype=tl.float32)
    ddown_bias = tl.zeros((BLOCK_R,), dtype=tl.float32)
    if GATED:
        gate = _weight_of(gate_ptr, hidden, channels, F, R, R, 1)
        gate_bias = _bias_of(gate_bias_ptr, hidden, F, HAS_GATE_BIAS)[:, None]
        dgate = tl.zeros((BLOCK_F, BLOCK_R), dtype=tl.float32)
        dgate_bias = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for start in range(0, rows_per_split, BLOCK_M):
        rows = split * rows_per_split + start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        x = _rows_of(x_ptr, rows, channels, M, R, stride_x)  # [BLOCK_M, BLOCK_R]
        dy = _rows_of(dy_ptr, rows, channels, M, R, stride_dy)
        h = tl.dot(up, tl.trans(x), input_precision=PRECISION) + up_bias  # [BLOCK_F, BLOCK_M]
        dh = tl.dot(down, tl.trans(dy), input_precision=PRECISION)
        if GATED:
            g = tl.dot(gate, tl.trans(x), input_precision=PRECISION) + gate_bias
            dg = dh * h * slope(g, ACTIVATION)
            dgate = tl.dot(dg.to(x.dtype), x, dgate, input_precision=PRECISION)
            dgate_bias += tl.sum(dg, axis=1)
            activated = activate(g, ACTIVATION)
            dh *= activated
            h *= activated
        else:
            dh *= slope(h, ACTIVATION)
            h = activate(h, ACTIVATION)
        dup = tl.dot(dh.to(x.dtype), x, dup, input_precision=PRECISION)
        dup_bias += tl.sum(dh, axis=1)
        ddown = tl.dot(h.to(x.dtype), dy, ddown, input_precision=PRECISION)
        ddown_bias += tl.sum(dy.to(tl.float32), axis=0)

    mask = (hidden < F)[:, None] & (channels < R)[None, :]
    at = (split * F + hidden)[:, None] * R + channels[None, :]
    tl.store(dup_ptr + at, dup, mask=mask)
    tl.store(dup_bias_ptr + split * F + hidden, dup_bias, mask=hidden < F)
    if GATED:
        tl.store(dgate_ptr + at, dgate, mask=mask)
        tl.store(dgate_bias_ptr + split * F + hidden, dgate_bias, mask=hidden < F)
    tl.store(ddown_ptr + (split * R + channels)[None, :] * F + hidden[:, None], ddown, mask=mask)
    if tl.program_id(0) == 0:  # every tile of hidden channels has summed dy
        tl.store(ddown_bias_ptr + split * R + channels, ddown_bias, mask=channels < R)


def forward_config(width: int, itemsize: int, gated: bool) -> dict[str, int]:
    """Tile sizes for a side width and bytes an element: no spills, shared memory within the chip's limit."""
    if itemsize == 4:
        return _tile(32, 32)
    return _tile(64, 32 if gated and width > 128 else 64)


def backward_config(width: int, itemsize: int, gated: bool) -> dict[str, int]:
    """The same for the gradient of x; x and dy of a wide side take half of the registers. Tiles that none of the
    compiled chips spills are few, and no larger one is among them."""
    if itemsize == 4:
        return _tile(16, 16) if width <= 128 else _tile(32, 32)
    if gated:
        return _tile(32, 32) if width <= 128 else _tile(16, 32)
    return _tile(64, 32) if width <= 64 else _tile(32, 32)


def weight_config(width: int, itemsize: int, gated: bool) -> dict[str, int]:
    """The same for the gradients of the weights, of which each has a tile in registers."""
    if itemsize == 4:
        return _tile(16, 16)
    return _tile(32 if gated or width > 128 else 64, 16 if gated and width > 128 else 32)


def _tile(rows: int, hidden: int) -> dict[str, int]:
    return {"BLOCK_M": rows, "BLOCK_F": hidden, "num_warps": 8, "num_stages": 2}


def forward(x: torch.Tensor, weights: Weights, activation: str) -> torch.Tensor:
    x_rows = as_rows(x)
    count, width = x_rows.shape
    y = torch.empty(x_rows.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        config = forward_config(width, x.element_size(), weights.gate_weight is not None)
        feed_forward_fwd_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
            x_rows,
            *_as_operands(x.dtype, weights),
            weights.down_bias,
            y,
            count,
            width,
            weights.up_weight.shape[0],
            x_rows.stride(0),
            HAS_DOWN_BIAS=weights.down_bias is not None,
            **_options(weights, activation),
            BLOCK_R=block_r(width),
            **config,
        )
    return y.view(x.shape)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weights: Weights,
    activation: str,
    need_dx: bool,
    need_dweights: bool,
) -> tuple[torch.Tensor | None, ...]:
    """dx in the dtype of x, and in float32 what each weight and bias gets; None for those that are not wanted."""
    operands, options = _as_operands(x.dtype, weights), _options(weights, activation)
    dy_rows, x_rows = as_rows(dy), as_rows(x)
    dx = _inputs(dy_rows, x_rows, operands, options).view(x.shape) if need_dx else None
    if not need_dweights:
        return dx, *(None,) * 6
    grads = _weights(dy_rows, x_rows, operands, options)
    return dx, *(None if weight is None else grad for weight, grad in zip(weights, grads, strict=True))


def _as_operands(dtype: torch.dtype, w: Weights) -> tuple[torch.Tensor | None, ...]:
    """What all kernels read, in their order: matrices densely in the dtype of x, biases as they are."""
    read = (w.up_weight, w.up_bias, w.gate_weight, w.gate_bias, w.down_weight)
    return tuple(x.to(dtype).contiguous() if x is not None and x.dim() == 2 else x for x in read)


def _options(w: Weights, activation: str) -> dict[str, Any]:
    return {
        "HAS_UP_BIAS": w.up_bias is not None,
        "HAS_GATE_BIAS": w.gate_bias is not None,
        "GATED": w.gate_weight is not None,
        "ACTIVATION": activation,
        "PRECISION": precision(),
    }


def _inputs(dy: torch.Tensor, x: torch.Tensor, operands: tuple, options: dict[str, Any]) -> torch.Tensor:
    count, width = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        config = backward_config(width, x.element_size(), options["GATED"])
        feed_forward_bwd_kernel[(triton.cdiv(count, config["BLOCK_M"]),)](
            dy,
            x,
            *operands,
            dx,
            count,
            width,
            operands[0].shape[0],
            dy.stride(0),
            x.stride(0),
            **options,
            BLOCK_R=block_r(width),
            **config,
        )
    return dx


def _weights(
    dy: torch.Tensor, x: torch.Tensor, operands: tuple, options: dict[str, Any]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of up weight and bias, down weight and bias, gate weight and bias (None without a gate)."""
    count, width = x.shape
    hidden, gated = operands[0].shape[0], options["GATED"]
    config = weight_config(width, x.element_size(), gated)
    tiles = max(1, triton.cdiv(hidden, config["BLOCK_F"]))
    splits = max(1, min(_PROGRAMS // tiles, triton.cdiv(count, 4 * config["BLOCK_M"])))
    rows_per_split = config["BLOCK_M"] * triton.cdiv(count, config["BLOCK_M"] * splits)

    def partial(*shape: int) -> torch.Tensor:
        return torch.empty((splits, *shape), dtype=torch.float32, device=x.device)

    up, down = (partial(hidden, width), partial(hidden)), (partial(width, hidden), partial(width))
    gate = (partial(hidden, width), partial(hidden)) if gated else (None, None)
    feed_forward_bwd_weight_kernel[(tiles, splits)](
        dy,
        x,
        *operands,
        *up,
        *gate,
        *down,
        count,
        width,
        hidden,
        rows_per_split,
        dy.stride(0),
        x.stride(0),
        **options,
        BLOCK_R=block_r(width),
        **config,
    )
    return tuple(None if p is None else p[0] if splits == 1 else p.sum(0) for p in (*up, *down, *gate))
