"""Compiles the kernel that rotates queries and keys ahead of time and prints one JSON line a case."""

from __future__ import annotations

import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops.packed_attention import triton_rotate


def main(capability: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for heads, head_dim in ((32, 128), (8, 128), (12, 64), (4, 256)):
            pointers = {"x_ptr": POINTER[dtype], "y_ptr": POINTER[dtype], "cosines_ptr": "*fp32", "sines_ptr": "*fp32"}
            config = {**triton_rotate.config(heads, head_dim // 2), "BACK": False}
            compiled = compile_kernel(
                triton_rotate.rotate_fwd_kernel, pointers, config, capability, (), ("H", "angles")
            )
            report(triton_rotate.rotate_fwd_kernel, compiled, dtype=str(dtype), heads=heads, head_dim=head_dim)


if __name__ == "__main__":
    main(int(sys.argv[1]))
