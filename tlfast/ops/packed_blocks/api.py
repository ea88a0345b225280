"""All blocks of a frozen transformer over packed sequences in one native call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from .. import _dispatch
from .._gemm import times_faster
from .._shared_weight import why_not_native
from ..frozen_linear import FrozenWeight, frozen_linear
from .native import packed_blocks as _run_native
from .table import Table

# A machine where the two are close then takes the same route in every process, which gives the same bits.
_CLEARLY_FASTER = 1.2


def packed_blocks(
    x: torch.Tensor,
    table: Table,
    cu_seqlens: torch.Tensor,
    taps: Sequence[int],
    bias: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What frozen_linear, packed_attention and norm_tap give block after block, to the last bit, in one call.

    A thread takes a few sequences through all blocks: activations between operations stay in its cache, no memory is
    asked for between them, and threads do not wait for each other. A few long sequences go together instead, and
    threads share each operation.

    Args:
        x: (T, D) in the table's dtype, contiguous: what the first block reads. No gradient.
        table: the blocks. Of float32 weights the result errs as PyTorch's own float32 does.
        cu_seqlens: int32 (B + 1,), rising from 0 to T: sequence b is the tokens cu_seqlens[b] to cu_seqlens[b + 1].
        taps: indices of the blocks whose outputs are wanted.
        bias: float32 (H, S, S), added to the scores of every sequence; S reaches at least the longest.
        rotation: cosines and sines, float32 (T, hd) each, as packed_attention takes them.

    Returns:
        The outputs of `taps` in order, (T, D) each, and the last hidden state (T, D), after the final norm if any.

    Cost: see the three operations; reads of x and writes of the taps are the only traffic beyond the weights.

    Raises:
        ValueError: a tap that is not there; bias or rotation that do not fit.
        RuntimeError: it cannot run here or on these inputs; `why_not` says so beforehand.
    """
    reason = why_not(x, table, cu_seqlens)
    if reason is not None:
        raise RuntimeError(f"packed_blocks cannot run: {reason}; run the operations one by one")
    count, form = len(table.blocks), table.form
    wrong = next((tap for tap in taps if not 0 <= tap < count), None)
    if wrong is not None:
        raise ValueError(f"taps: {wrong} is not a block; there are blocks 0 to {count - 1}")
    longest = _longest(cu_seqlens.tolist())
    if bias is not None:
        fits = bias.dim() == 3 and bias.shape[0] == form.heads and min(bias.shape[1:]) >= longest
        _check("bias", bias, fits, f"({form.heads}, S, S) with S of at least {longest}")
    for part in rotation or ():
        fits = part.shape == (x.shape[0], form.head_dim) and form.head_dim % 2 == 0
        _check("rotation", part, fits, f"two of ({x.shape[0]}, {form.head_dim}), of an even head_dim")
    return _run_native(x, table, cu_seqlens.contiguous(), tuple(taps), bias, rotation)


def why_not(x: torch.Tensor, table: Table, cu_seqlens: torch.Tensor) -> str | None:
    """None where `packed_blocks` can run, otherwise the reason it cannot."""
    if "native" in _dispatch.MISSING:
        return _dispatch.MISSING["native"]
    if not _dispatch.runs_eagerly(x):
        return "a gradient or a trace is being taken"
    reason = why_not_native() if table.dtype == torch.float32 else None
    if reason is not None:
        return reason
    if x.device.type != "cpu" or x.dtype != table.dtype or not x.is_contiguous() or x.shape[1:] != (table.width,):
        given = f"{x.dtype} {tuple(x.shape)} on {x.device}"
        return f"it takes contiguous {table.dtype} (T, {table.width}) on the CPU, not {given}"
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.device.type != "cpu" or cu_seqlens.dim() != 1:
        return f"cu_seqlens must be int32 (B + 1,) on the CPU, not {cu_seqlens.dtype} on {cu_seqlens.device}"
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0 or offsets[-1] != x.shape[0] or offsets != sorted(offsets):
        return f"cu_seqlens must rise from 0 to the {x.shape[0]} tokens of x, not be {offsets}"
    return None


@functools.cache
def pays_in_float32() -> bool:
    """Whether the native library's products in float32 clearly beat PyTorch's, so that blocks should run at once.

    Probed once a process, in some 50 ms. They do where F.linear is slow (MKL on AMD) or AMX runs at its full rate,
    which virtual machines may not give.
    """
    if why_not_native() is not None:
        return False
    x, w = torch.ones(1024, 768), torch.ones(384, 768)
    stored = FrozenWeight.of(w)
    with torch.no_grad():
        factor = times_faster(lambda: frozen_linear(x, stored, impl="native"), than=lambda: F.linear(x, w), rounds=4)
    return factor > _CLEARLY_FASTER


def _longest(offsets: list[int]) -> int:
    return max((end - start for start, end in pairwise(offsets)), default=0)


def _check(name: str, tensor: torch.Tensor, fits: bool, expected: str) -> None:
    if not fits or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be float32 {expected} on the CPU, not {given}")
