"""Compiles every kernel of the feed-forward ahead of time, one JSON line each; run by test_aot_feed_forward.py."""

from __future__ import annotations

import itertools
import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops.feed_forward import triton as feed_forward


def main(capability: int, widths: list[int]) -> None:
    kernels = feed_forward.feed_forward_fwd_kernel, feed_forward.feed_forward_bwd_kernel
    # float16 compiles as bfloat16 does
    for hidden, dtype, gated in itertools.product(widths, (torch.bfloat16, torch.float32), (False, True)):
        pointers = dict.fromkeys(("h_ptr", "a_ptr"), POINTER[dtype])
        options = {"GATED": gated, "ACTIVATION": "gelu"}  # the exact one, which takes the most registers
        for kernel in kernels:
            compiled = compile_kernel(kernel, pointers, options | feed_forward.config(hidden), capability, (), ())
            report(kernel, compiled, hidden=hidden, dtype=str(dtype), gated=gated)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(x) for x in sys.argv[2:]])
