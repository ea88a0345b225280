"""Compiles the kernel of linear_cross_entropy ahead of time; run by test_aot_linear_cross_entropy.py."""

from __future__ import annotations

import itertools
import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops.linear_cross_entropy import triton as linear_cross_entropy


def main(capability: int, sizes: list[str]) -> None:
    """sizes: vocabulary:stride, the numbers from a row to the next."""
    kernel = linear_cross_entropy.linear_cross_entropy_fwd_kernel
    # float16 compiles as bfloat16 does
    cases = itertools.product(sizes, (torch.bfloat16, torch.float32), (False, True), (False, True))
    for size, dtype, need_gradient, bent in cases:
        vocabulary, stride = map(int, size.split(":"))
        pointers = {
            "logits_ptr": POINTER[dtype],
            "labels_ptr": "*i64",
            "bias_ptr": POINTER[dtype],
            "losses_ptr": "*fp32",
        }
        options = {"NEED_GRADIENT": need_gradient, "HAS_BIAS": bent, "HAS_CAP": bent}
        odd = {"ignored"} | {name for name, value in (("V", vocabulary), ("stride", stride)) if value % 16}
        config = options | linear_cross_entropy.config(stride)
        compiled = compile_kernel(kernel, pointers, config, capability, ("cap",), odd)
        report(kernel, compiled, size=size, dtype=str(dtype), need_gradient=need_gradient, bent=bent)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
