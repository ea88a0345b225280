"""The sum and its gradient on the GPU: products by PyTorch, and one kernel in Triton between them.

A program walks along a token's logits, as the product gives them, and where the gradient is wanted once more, writing
it over them: nothing as large as the logits is made beside them. Tokens without a label stay in: leaving them out would
wait for the GPU to say how many they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..frozen_linear import FrozenWeight
from .head import Head
from .parts import parts

# Logits that exist at once, padding included, or as many as hidden has numbers; one token's where that is more.
MAP_ELEMENTS = 2**24
_ROWS = 128  # what a part is a multiple of where it can be: rows of a tile of the products
_ALIGNED = 16  # numbers; what Triton and cuBLAS look for


@triton.jit
def tanh(x):
    # 1 - 2 / (1 + exp(2 x)) loses digits near 0, where a polynomial is right to 2 units in the last place
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size))
    square = x * x
    series = -0.00590584
    series = series * square + 0.02080536
    series = series * square - 0.05378667
    series = series * square + 0.13331958
    series = series * square - 0.33333299
    y = tl.where(size < 0.6, size + size * (square * series), far)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def read_logits(row_ptr, bias_ptr, columns, V, stride, cap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    # in float32, -inf past the last, and their derivative by what the cap is laid on
    x = tl.load(row_ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
    inside = columns < V
    slope = 1.0
    if HAS_CAP:
        bent = tanh(x / cap)
        x = bent * cap
        slope = 1.0 - bent * bent
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x, float("-inf")), slope


@triton.jit
def linear_cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, bias_ptr, losses_ptr, V, stride, ignored, cap,
    NEED_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK_V)  # [BLOCK_V]
    label = tl.load(labels_ptr + row)
    if label == ignored:
        tl.store(losses_ptr + row, 0.0)
        if NEED_GRADIENT:
            nothing = tl.zeros([BLOCK_V], logits_ptr.dtype.element_ty)
            for first in range(0, V, BLOCK_V):
                tl.store(row_ptr + first + lanes, nothing, mask=first + lanes < stride)
    else:
        # every lane its own largest logit and sum of exponentials, so that none waits for another within the row; not
        # -inf to begin with, which is NaN when it is taken from itself. The largest is never NaN, the sum then is.
        largest = tl.full([BLOCK_V], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK_V], tl.float32)
        for first in range(0, V, BLOCK_V):
            x, _ = read_logits(row_ptr, bias_ptr, first + lanes, V, stride, cap, HAS_BIAS, HAS_CAP)
            smaller = tl.exp(-tl.abs(x - largest))
            total = tl.where(x > largest, total * smaller + 1.0, total + smaller)
            largest = tl.where(x > largest, x, largest)
        shift = tl.max(largest, axis=0)
        total_of_row = tl.sum(total * tl.exp(largest - shift), axis=0)

        # a label outside the vocabulary makes loss and gradient NaN
        known = (label >= 0) & (label < V)
        total_of_row = tl.where(known, total_of_row, float("nan"))
        at = tl.where(known, label, 0)
        own, _ = read_logits(row_ptr, bias_ptr, at, V, stride, cap, HAS_BIAS, HAS_CAP)
        tl.store(losses_ptr + row, tl.log(total_of_row) - (own - shift))
        if NEED_GRADIENT:
            tl.debug_barrier()  # the own logit is overwritten below
            inverse = 1.0 / total_of_row
            blocks = tl.cdiv(V, BLOCK_V)
            for i in range(0, blocks):  # backwards: the row's end was read last and may still be in a cache
                columns = (blocks - 1 - i) * BLOCK_V + lanes
                x, slope = read_logits(row_ptr, bias_ptr, columns, V, stride, cap, HAS_BIAS, HAS_CAP)
                dx = tl.exp(x - shift) * inverse
                dx = tl.where(columns == label, dx - 1.0, dx) * slope
                tl.store(row_ptr + columns, dx.to(logits_ptr.dtype.element_ty), mask=columns < stride)


def config(stride: int) -> dict[str, int]:
    """Columns that a program takes at a time, for the numbers from a row to the next: 8 a thread.

    Rows that begin anywhere are read number by number, which takes registers.
    """
    block = min(4096 if stride % _ALIGNED == 0 else 2048, max(256, triton.next_power_of_2(stride)))
    return {"BLOCK_V": block, "num_warps": block // 256, "num_stages": 1}


def rows_at_once(tokens: int, width: int, vocabulary: int) -> int:
    """How many tokens' logits exist at once."""
    rows = max(1, max(MAP_ELEMENTS, tokens * width) // max(1, _padded(vocabulary)))
    return rows if rows < _ROWS else rows // _ROWS * _ROWS


def _padded(vocabulary: int) -> int:
    return triton.cdiv(vocabulary, _ALIGNED) * _ALIGNED


def linear_cross_entropy(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, ignored: int, need_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the losses, and its gradient by hidden (T, D)."""
    head = head.read_in(hidden.dtype)
    labels = labels.contiguous()
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_gradient else None
    matrix = head.matrix(hidden.dtype) if need_gradient else None
    for part in parts(len(hidden), rows_at_once(len(hidden), hidden.shape[1], head.shape[0])):
        logits = _logits(head, hidden[part])
        _reduce(head, logits, labels[part], ignored, losses[part], need_gradient)
        if gradient is not None and matrix is not None:
            torch.mm(logits.to(matrix.dtype), matrix, out=gradient[part])
        del logits  # before the next part's
    if gradient is not None and head.scale != 1.0:
        gradient *= head.scale
    return losses.sum(), gradient


def _logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """W (scale h); of a plain weight in rows that begin at multiples of _ALIGNED: loads and products are wide."""
    if isinstance(head.weight, FrozenWeight):
        return head.product(hidden)
    vocabulary = head.shape[0]
    room = torch.empty(len(hidden), _padded(vocabulary), dtype=hidden.dtype, device=hidden.device)
    return torch.mm(head.scaled(hidden), head.weight.T, out=room[:, :vocabulary])


def _reduce(
    head: Head, logits: torch.Tensor, labels: torch.Tensor, ignored: int, losses: torch.Tensor, need_gradient: bool
) -> None:
    """Writes the losses of a part, and over its logits their gradient where it is wanted."""
    linear_cross_entropy_fwd_kernel[(len(logits),)](
        logits,
        labels,
        None if head.bias is None else head.bias.contiguous(),
        losses,
        logits.shape[1],
        logits.stride(0),
        ignored,
        0.0 if head.cap is None else head.cap,
        NEED_GRADIENT=need_gradient,
        HAS_BIAS=head.bias is not None,
        HAS_CAP=head.cap is not None,
        **config(logits.stride(0)),
    )
