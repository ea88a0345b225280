"""Rotation of queries and keys on the GPU in Triton: a program takes a few heads of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_NUMBERS = 2048  # that a program holds of each half


@triton.jit
def rotate_fwd_kernel(
    x_ptr, cosines_ptr, sines_ptr, y_ptr,
    H, HALF, angles, stride_token, stride_head,
    BACK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)
    kept = channel < HALF
    mask = (head < H) & kept[None, :]
    place = token * stride_token + head * stride_head + channel[None, :]
    first = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    second = tl.load(x_ptr + place + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = token % angles * 2 * HALF + channel
    cosine = tl.load(cosines_ptr + angle, mask=kept, other=0.0)[None, :]
    sine = tl.load(sines_ptr + angle, mask=kept, other=0.0)[None, :]
    if BACK:
        sine = -sine
    y_place = (token * H + head) * 2 * HALF + channel[None, :]
    tl.store(y_ptr + y_place, (first * cosine - second * sine).to(y_ptr.dtype.element_ty), mask=mask)
    cosine = tl.load(cosines_ptr + angle + HALF, mask=kept, other=0.0)[None, :]
    sine = tl.load(sines_ptr + angle + HALF, mask=kept, other=0.0)[None, :]
    if BACK:
        sine = -sine
    tl.store(y_ptr + y_place + HALF, (second * cosine + first * sine).to(y_ptr.dtype.element_ty), mask=mask)


def config(heads: int, half: int) -> dict[str, int]:
    """Tile sizes: half of a head's channels, and as many heads as a program may hold."""
    block = triton.next_power_of_2(half)
    together = min(triton.next_power_of_2(heads), max(1, _NUMBERS // block))
    return {
        "BLOCK_H": together,
        "BLOCK_D": block,
        "num_warps": max(1, min(8, together * block // 256)),
        "num_stages": 1,
    }


def rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, back: bool = False) -> torch.Tensor:
    """x * cosines + (-second, first) * sines in float32, rounded once: each first half of x against its second.

    x (T, H, hd) of neighbouring channels, any other strides; cosines and sines float32 (T, hd), or (S, hd) of every S
    tokens in turn, contiguous. back: by the negative angles. Returns (T, H, hd), contiguous. x in and out once, and
    8 hd bytes a row of the tables; 6 flops a number.
    """
    tokens, heads, head_dim = x.shape
    y = torch.empty((tokens, heads, head_dim), dtype=x.dtype, device=x.device)
    if y.numel():
        sizes = config(heads, head_dim // 2)
        rotate_fwd_kernel[(tokens, triton.cdiv(heads, sizes["BLOCK_H"]))](
            x, cosines, sines, y, heads, head_dim // 2, len(cosines), x.stride(0), x.stride(1), BACK=back, **sizes
        )
    return y
