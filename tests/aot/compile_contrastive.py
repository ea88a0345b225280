"""Compiles the kernels of the contrastive losses ahead of time; run by test_aot_contrastive.py."""

from __future__ import annotations

import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops.contrastive import triton as contrastive

KERNELS = (
    contrastive.contrastive_softmax_fwd_kernel,
    contrastive.contrastive_softmax_bwd_kernel,
    contrastive.contrastive_sigmoid_fwd_kernel,
    contrastive.contrastive_sigmoid_bwd_kernel,
)
NUMBERS = ("scale", "bias", "rows", "drows", "columns", "dcolumns", "own", "down", "slopes")


def main(capability: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pointers = {f"{name}_ptr": "*fp32" for name in NUMBERS}
        pointers |= {f"{name}_ptr": POINTER[dtype] for name in ("u", "v", "w")}
        for kernel in KERNELS:
            for odd in ((), ("N", "M", "offset")):
                compiled = compile_kernel(
                    kernel, pointers, contrastive.config(dtype, "fwd" in kernel.__name__), capability, (), odd
                )
                report(kernel, compiled, dtype=str(dtype), odd=bool(odd))


if __name__ == "__main__":
    main(int(sys.argv[1]))
