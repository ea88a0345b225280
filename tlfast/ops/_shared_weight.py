"""Float32 weights where a model has them, as the native library reads them (struct tl_shared_weight, tlfast.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from .. import _native

PARTS = 3


def why_not_native() -> str | None:
    """None where the native library multiplies float32 matrices, otherwise the reason."""
    isa = _native.matrix_isa()
    if isa == "AMX" or isa.startswith("AVX-512"):
        return None
    return f"products in float32 need AVX-512 or AMX, and this machine has {isa}"


def linear_fp32(
    rows: torch.Tensor,
    parts: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    y: torch.Tensor,
    outputs: int,
    activation: int,
    gated: bool = False,
) -> None:
    """y = activation(rows w^T + bias) by csrc/ops/cpu/matrix/linear_fp32.cpp, which adds up 128 terms at a time.

    rows (M, K) with neighbouring channels; parts as in `shared_weight`; activation: the library's code; outputs, gated:
    as tlfast.h has them.
    """
    weight = shared_weight(parts)
    _native.library().linear_fp32_cpu(
        rows.data_ptr(),
        weight.data_ptr(),
        _native.pointer(bias),
        y.data_ptr(),
        *rows.shape,
        outputs,
        rows.stride(0),
        y.shape[-1],
        activation,
        gated,
        torch.get_num_threads(),
    )


def shared_weight(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The struct's bytes, for up to three (N_i, K) float32 of the same strides, which must outlive it."""
    missing = [0] * (PARTS - len(parts))
    addresses = [*(part.data_ptr() for part in parts), *missing]
    outputs = [*(part.shape[0] for part in parts), *missing]
    return torch.frombuffer(bytearray(struct.pack("8q", *addresses, *outputs, *parts[0].stride())), dtype=torch.uint8)
