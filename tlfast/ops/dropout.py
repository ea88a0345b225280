"""Stateless dropout: a hash of seed, row and column says whether an entry is kept, so no mask is stored."""

from __future__ import annotations

from typing import Any

import torch

_ROW_STEP = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_COLUMN_STEP, _HASH_1, _HASH_2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
_LOW_32 = 0xFFFFFFFF


def dropout(x: torch.Tensor, p: float, seed: int | torch.Tensor) -> torch.Tensor:
    """x with each entry zeroed with probability p and the others divided by 1 - p.

    Args:
        x: (..., C), any floating dtype; differentiable.
        p: probability of dropping, in [0, 1).
        seed: int, or 0-dim int64 tensor as `torch.randint(2**62, ())` draws it (torch.compile traces that). The same
            seed gives the same mask in every implementation and on every device.

    Returns:
        Shaped like x, in its dtype. Row of the mask: flattened leading index; column: last index.

    Raises:
        ValueError: p outside [0, 1), seed missing or not an integer.
    """
    drawn = check_dropout(p, seed)
    return x if drawn is None else _Dropout.apply(x, float(p), drawn)


class _Dropout(torch.autograd.Function):
    """Keeps the seed alone; its gradient is dropout of the gradient with the same mask, at any order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
        ctx.p = p
        ctx.save_for_backward(seed)
        columns = x.shape[-1] if x.dim() else 1
        rows = torch.arange(x.numel() // max(columns, 1), device=x.device)
        return x * keep_mask(p, seed, rows, columns).view(x.shape) * (1 / (1 - p))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(grad, ctx.p, seed), None, None


def keep_mask(p: float, seed: torch.Tensor, rows: torch.Tensor, columns: int) -> torch.Tensor:
    """Kept entries, (*rows.shape, columns) bool, of int64 row numbers; bit for bit those of csrc/common/dropout.h."""
    key = _row_keys(seed, rows).unsqueeze(-1)
    column = torch.arange(columns, device=rows.device) * _COLUMN_STEP
    x = (column + key) & _LOW_32
    # int64 stands in for uint32: products wrap modulo 2^64, which keeps their low 32 bits
    x = ((x ^ (x >> 16)) * _HASH_1) & _LOW_32
    x = ((x ^ (x >> 15)) * _HASH_2) & _LOW_32
    return (x ^ (x >> 16)) >= int(p * 2**32)


def _row_keys(seed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    x = seed.to(rows.device) + (rows + 1) * _signed(_ROW_STEP)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return (x ^ _shift_right(x, 31)) & _LOW_32


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift of the int64's bits as an unsigned number: zeros come in from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def check_dropout(p: float, seed: int | torch.Tensor | None) -> torch.Tensor | None:
    """The seed as a 0-dim int64 tensor, None where p is 0 and nothing is to be drawn.

    Raises:
        ValueError: p outside [0, 1), seed missing or not an integer.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), not {p}")
    if p == 0:
        return None
    if isinstance(seed, torch.Tensor):
        if seed.shape != () or seed.dtype != torch.int64:
            raise ValueError(f"seed must be a 0-dim int64 tensor, not {seed.dtype} of shape {tuple(seed.shape)}")
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(
            f"seed must be an int or a 0-dim int64 tensor where dropout_p > 0, not {type(seed).__name__}:"
            " draw one with torch.randint(2**62, ())"
        )
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 signed bits, not {seed}")
    return torch.tensor(seed, dtype=torch.int64)


def unsigned(seed: torch.Tensor | None) -> int:
    """The seed as the native library takes it: 64 unsigned bits, 0 where nothing is drawn."""
    return 0 if seed is None else int(seed.item()) & (2**64 - 1)
