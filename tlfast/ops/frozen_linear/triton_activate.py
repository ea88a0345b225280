"""What comes behind a product of PyTorch's own, in one pass on the GPU in Triton: bias, activation and gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._triton import activate
from .triton_tiles import gate

_BLOCK = 1024


@triton.jit
def activate_fwd_kernel(
    x_ptr, bias_ptr, y_ptr,
    N,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)  # [BLOCK]
    x = tl.load(x_ptr + row * N + column, mask=column < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=column < N, other=0.0)
    if GATED:
        y = tl.reshape(gate(x[None, :], ACTIVATION, 1, BLOCK), (BLOCK // 2,))
        N, column = N // 2, first // 2 + tl.arange(0, BLOCK // 2)
    else:
        y = activate(x, ACTIVATION)
    tl.store(y_ptr + row * N + column, y.to(y_ptr.dtype.element_ty), mask=column < N)


def config() -> dict[str, int]:
    """Tile size: 8 numbers a thread."""
    return {"BLOCK": _BLOCK, "num_warps": 4, "num_stages": 1}


def finished(
    x: torch.Tensor, bias: torch.Tensor | None, activation: str, out_dtype: torch.dtype, gated: bool = False
) -> torch.Tensor:
    """activation(x + bias) in out_dtype, (M, N) as x is; over x where its dtype and shape are the result's.

    x (M, N) contiguous; bias (N,) float32. gated: as in int8_linear. M N (x_bytes + out_bytes) bytes, of a gated one
    half as many out; 10 flops a number.
    """
    count, outputs = x.shape
    in_place = out_dtype == x.dtype and not gated
    y = x if in_place else torch.empty((count, outputs // 2 if gated else outputs), dtype=out_dtype, device=x.device)
    if y.numel():
        activate_fwd_kernel[(count, triton.cdiv(outputs, _BLOCK))](
            x, bias, y, outputs, HAS_BIAS=bias is not None, ACTIVATION=activation, GATED=gated, **config()
        )
    return y
