"""Attention of packed sequences on a GPU by PyTorch's flash attention, all sequences in one call, without a map.

The operator is private to PyTorch; torch.nn.attention.varlen, which calls it, is not there before 2.10. Its arguments
up to the windows have been the same since 2.6.
"""

from __future__ import annotations

import torch

from .. import _dispatch
from .._gpu import capability

_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST = 256  # channels of a head


def refuses(q: torch.Tensor, window: int | None, bias: torch.Tensor | None, crosses: bool, rotates: bool) -> str | None:
    """Why these inputs cannot be taken, or None. crosses: k's sequences are others than q's."""
    if not hasattr(torch.ops.aten, "_flash_attention_forward"):
        return "this PyTorch has no flash attention of packed sequences; use impl='buckets'"
    if q.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, not {q.dtype}; use impl='buckets'"
    if q.shape[2] % 8 or q.shape[2] > _WIDEST:
        return f"it takes heads of 8, 16 ... {_WIDEST} channels, not {q.shape[2]}; use impl='buckets'"
    if bias is not None:
        return "it adds no bias; use impl='buckets'"
    if window is not None and crosses:
        return "its windows count from the last key; use impl='buckets'"
    if rotates and "triton" in _dispatch.MISSING:
        return f"it rotates by Triton: {_dispatch.MISSING['triton']}"
    return _too_old(q.device)


def _too_old(device: torch.device) -> str | None:
    if device.type != "cuda" or capability(device) >= 80:
        return None
    return f"it needs a GPU of compute capability 8.0 or newer, and {device} has {capability(device) / 10}"


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    causal: bool,
    window: int | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """starts: of the sequences of q and of k, where they are. longest: of each."""
    if rotation is not None:
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
    if not all(longest):
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    right = 0 if causal else window
    windows = {} if window is None else {"window_size_left": window, "window_size_right": right}
    attended = torch.ops.aten._flash_attention_forward(
        q, k, v, *starts, *longest, 0.0, causal, False, scale=scale, **windows
    )
    return attended[0]


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    from .triton_rotate import rotate  # Triton must not be imported before someone asks for it

    return rotate(x if x.stride(-1) == 1 else x.contiguous(), cosines.contiguous(), sines.contiguous())
