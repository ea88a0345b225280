"""The dtypes rows are quantised to, and which of them an implementation can write here."""

from __future__ import annotations

import torch

from . import _dispatch

# the largest magnitude of each: a row's largest number becomes it
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

# A scale below this, the smallest normal float32, counts as 0: its reciprocal would overflow.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def refusal(impl: str, x: torch.Tensor, quantised: torch.dtype | None) -> str | None:
    """Why a kernel cannot read x and write rows of `quantised`, None where it can; the reference takes all."""
    if impl == "reference":
        return None
    if x.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not torch.float64; use impl='reference'"
    if impl == "native":
        if quantised == torch.float8_e4m3fn:
            return "it quantises to torch.int8, not torch.float8_e4m3fn; use impl='reference'"
        return None
    if _dispatch.TRITON_INTERPRETED:
        if x.dtype == torch.bfloat16 or quantised == torch.float8_e4m3fn:
            return "Triton's interpreter computes bfloat16 and float8 wrongly; unset TRITON_INTERPRET or use others"
    elif quantised == torch.float8_e4m3fn and torch.cuda.get_device_capability(x.device) < (8, 9):  # pragma: gpu
        return "this GPU has no float8, GPUs from compute capability 8.9 on have; use torch.int8"
    return None
