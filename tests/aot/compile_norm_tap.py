"""Compiles the kernels of norm_tap and quantise_rows ahead of time; run by test_aot_norm_tap.py."""

from __future__ import annotations

import itertools
import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops._quantised import LARGEST
from tlfast.ops.norm_tap import triton as norm_tap
from tlfast.ops.quantise_rows import triton as quantise_rows


def sources(width: int, dtype: torch.dtype, quantised: torch.dtype | None):
    """(kernel, pointer types by argument, constexprs and launch options) at one width, with every option taken."""
    x = POINTER[dtype]
    norm = {"x_ptr": x, "residual_ptr": x, "total_ptr": x, "y_ptr": x, "weight_ptr": "*fp32", "bias_ptr": "*fp32"}
    rows = {"values_ptr": POINTER[quantised or torch.int8], "scale_ptr": "*fp32"}
    options = {"HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_BIAS": True}
    largest = {"LARGEST": LARGEST.get(quantised, 0.0)}
    for rms in (False, True):
        constants = {**options, **largest, "RMS": rms, **norm_tap.config(width)}
        yield norm_tap.norm_tap_fwd_kernel, norm | rows, constants
    if quantised is not None:
        constants = {"HAS_SMOOTH": True, **largest, **quantise_rows.config(width)}
        yield quantise_rows.quantise_rows_fwd_kernel, {"x_ptr": x, "smooth_ptr": "*fp32", **rows}, constants


def main(capability: int, widths: list[int]) -> None:
    formats = [None, torch.int8] if capability < 89 else [None, torch.int8, torch.float8_e4m3fn]
    for width, dtype, quantised in itertools.product(widths, (torch.bfloat16, torch.float32), formats):
        for kernel, pointers, config in sources(width, dtype, quantised):
            compiled = compile_kernel(kernel, pointers, config, capability, ("eps",), ())
            report(kernel, compiled, width=width, dtype=str(dtype), quantised=str(quantised))


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(x) for x in sys.argv[2:]])
