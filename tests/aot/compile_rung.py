"""Compiles every kernel of the rung ahead of time and prints one JSON line each; run by test_aot_rung.py."""

from __future__ import annotations

import itertools
import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops._triton import block_r
from tlfast.ops.rung import triton as rung


def sources(width: int, h_dtype: torch.dtype, s_dtype: torch.dtype, precision: str):
    """(name, kernel, pointer types by argument, constexprs, launch options) of each kernel at one width."""
    h, s = POINTER[h_dtype], POINTER[s_dtype]
    gates = {"alpha_ptr": "*fp32"}
    shape = {"BLOCK_R": block_r(width), "PER_CHANNEL": True}
    size = h_dtype.itemsize
    sums = "*fp64" if s_dtype == torch.float32 else "*fp32"
    yield (
        rung.rung_fwd_kernel,
        {"h_ptr": h, "s_ptr": s, "weight_ptr": h, "bias_ptr": "*fp32", "z_ptr": s, **gates},
        {**shape, "HAS_BIAS": True, "PRECISION": precision, **rung.forward_config(width, size)},
    )
    yield (
        rung.rung_bwd_weight_kernel,
        {"dz_ptr": s, "h_ptr": h, "dweight_ptr": "*fp32", **gates},
        {**shape, "PRECISION": precision, **rung.weight_config(width, size)},
    )
    yield (
        rung.rung_bwd_kernel,
        {"dz_ptr": s, "s_ptr": s, "z_ptr": s, "ds_ptr": s, "dbias_ptr": sums, "dalpha_ptr": sums, **gates},
        {**shape, "NEED_DS": True, "NEED_DBIAS": True, "NEED_DALPHA": True, **rung.sums_config(width)},
    )


def main(capability: int, widths: list[int]) -> None:
    # float16 compiles as bfloat16 does: the same sizes, the same tensor-core shapes
    dtypes = [
        (torch.bfloat16, torch.float32, "ieee"),
        (torch.bfloat16, torch.bfloat16, "ieee"),
        (torch.float32, torch.float32, "ieee"),
        (torch.float32, torch.float32, "tf32"),
    ]
    for width, (h_dtype, s_dtype, precision) in itertools.product(widths, dtypes):
        for kernel, pointers, config in sources(width, h_dtype, s_dtype, precision):
            if precision == "tf32" and kernel is rung.rung_bwd_kernel:
                continue  # it multiplies no matrices
            compiled = compile_kernel(kernel, pointers, config, capability, ("temperature",), ("M", "inner_rows"))
            report(kernel, compiled, width=width, h=str(h_dtype), s=str(s_dtype), precision=precision)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(x) for x in sys.argv[2:]])
