"""Blocks over packed sequences on the CPU: C++ (csrc/ops/cpu/matrix/packed_blocks.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from ..frozen_linear.codes import ACTIVATION_CODES
from .table import Table

# enum tl_placement in csrc/tlfast.h
_PLACEMENTS = {"post": 0, "pre": 1}


def packed_blocks(
    x: torch.Tensor,
    table: Table,
    cu_seqlens: torch.Tensor,
    taps: tuple[int, ...],
    bias: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    count, form = len(table.blocks), table.form
    outputs = {index: torch.empty(x.shape, dtype=x.dtype, device="cpu") for index in dict.fromkeys(taps)}
    last = outputs.get(count - 1) if table.final_norm is None else None
    if last is None:
        last = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    wanted = [_native.pointer(outputs.get(index)) for index in range(count)]
    addresses = torch.tensor([*wanted, last.data_ptr()], dtype=torch.int64)
    cosines, sines = (None, None) if rotation is None else (part.contiguous() for part in rotation)
    bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
    _native.library().packed_blocks_cpu(
        x.data_ptr(),
        table.rows.data_ptr(),
        _native.pointer(table.final_row),
        cu_seqlens.data_ptr(),
        _native.pointer(bias),
        _native.pointer(cosines),
        _native.pointer(sines),
        addresses.data_ptr(),
        cu_seqlens.shape[0] - 1,
        count,
        x.shape[1],
        form.heads,
        form.kv_heads,
        form.head_dim,
        form.k_offset,
        form.v_offset,
        *((0, 0) if bias is None else bias.stride()[:2]),
        _native.dtype_code(x.dtype),
        _PLACEMENTS[form.placement],
        form.rms,
        ACTIVATION_CODES[form.activation],
        form.causal,
        form.scale,
        torch.get_num_threads(),
    )
    return [outputs[index] for index in taps], last
