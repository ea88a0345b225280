"""All blocks of a frozen transformer over packed sequences in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .. import _dispatch
from .native import packed_blocks as _run_native
from .table import Table

_PREPARED = ("bf16", "int8", "nf4", "int8_weight_only")


@dataclass(frozen=True)
class Form:
    """What blocks of a stack have in common.

    k_offset, v_offset: where keys and values begin in a row of what qkv gives. scale: of the scores. placement: "post"
    or "pre". activation: as `frozen_linear` names it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    k_offset: int
    v_offset: int
    scale: float
    causal: bool
    placement: str
    rms: bool
    activation: str


def packed_blocks(
    x: torch.Tensor,
    table: Table,
    form: Form,
    cu_seqlens: torch.Tensor,
    taps: Sequence[int],
    bias: torch.Tensor | None = None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What frozen_linear, packed_attention and norm_tap give block after block, to the last bit, in one call.

    A thread takes a few sequences through all blocks: activations between operations stay in its cache, no memory is
    asked for between them, and threads do not wait for each other.

    Args:
        x: (T, D) bfloat16, contiguous: what the first block reads. No gradient.
        table, form: the blocks.
        cu_seqlens: int32 (B + 1,), as packed_attention takes it, as are bias and rotation.
        taps: indices of the blocks whose outputs are wanted.

    Returns:
        The outputs of `taps` in order, (T, D) each, and the last hidden state (T, D), after the final norm if any.

    Cost: see the three operations; reads of x and writes of the taps are the only traffic beyond the weights.

    Raises:
        RuntimeError: it cannot run here or on these inputs; `why_not` says so beforehand.
    """
    reason = why_not(x, table, cu_seqlens)
    if reason is not None:
        raise RuntimeError(f"packed_blocks cannot run: {reason}; run the operations one by one")
    return _run_native(x, table, form, cu_seqlens, tuple(taps), bias, rotation)


def why_not(x: torch.Tensor, table: Table, cu_seqlens: torch.Tensor, threads: int | None = None) -> str | None:
    """None where `packed_blocks` can run and uses all threads, otherwise the reason it cannot or should not.

    threads: None: torch's.
    """
    if "native" in _dispatch.MISSING:
        return _dispatch.MISSING["native"]
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not x.is_contiguous():
        return f"it takes contiguous bfloat16 on the CPU, not {x.dtype} on {x.device}"
    if not table.blocks:
        return "there are no blocks"
    layers = (block[:4] for block in table.blocks)
    if any(layer.precision not in _PREPARED for four in layers for layer in four):
        return f"it takes weights in one of {_PREPARED}"
    if not _dispatch.runs_eagerly(x):
        return "a gradient or a trace is being taken"
    threads = torch.get_num_threads() if threads is None else threads
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != x.shape[0] or offsets != sorted(offsets):
        return f"cu_seqlens must rise from 0 to the {x.shape[0]} tokens of x, not be {offsets}"
    longest = max((end - start for start, end in pairwise(offsets)), default=0)
    if threads > 1 and 2 * threads * longest > x.shape[0]:
        return (
            f"{len(offsets) - 1} sequences, the longest of {longest} tokens, cannot be shared out to {threads} threads"
        )
    return None
