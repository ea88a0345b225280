"""Compiles every kernel of the feed-forward ahead of time, one JSON line each; run by test_aot_feed_forward.py."""

from __future__ import annotations

import itertools
import sys

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops._triton import block_r
from tlfast.ops.feed_forward import triton as feed_forward

ODD = ("M", "rows_per_split")


def sources(width: int, dtype: torch.dtype, gated: bool, precision: str):
    """(kernel, pointer types by argument, constexprs and launch options) of each kernel at one width."""
    operands = dict.fromkeys(("x_ptr", "up_ptr", "gate_ptr", "down_ptr"), POINTER[dtype])
    operands |= dict.fromkeys(("up_bias_ptr", "gate_bias_ptr"), "*fp32")
    # the exact gelu takes the most registers; a model has all biases or none
    options = {"GATED": gated, "ACTIVATION": "gelu", "PRECISION": precision, "BLOCK_R": block_r(width)}
    options |= {"HAS_UP_BIAS": True, "HAS_GATE_BIAS": True}
    sizes = width, dtype.itemsize, gated
    yield (
        feed_forward.feed_forward_fwd_kernel,
        {**operands, "down_bias_ptr": "*fp32", "y_ptr": POINTER[dtype]},
        {**options, "HAS_DOWN_BIAS": True, **feed_forward.forward_config(*sizes)},
    )
    yield (
        feed_forward.feed_forward_bwd_kernel,
        {**operands, "dy_ptr": POINTER[dtype], "dx_ptr": POINTER[dtype]},
        {**options, **feed_forward.backward_config(*sizes)},
    )
    written = ("dup_ptr", "dup_bias_ptr", "dgate_ptr", "dgate_bias_ptr", "ddown_ptr", "ddown_bias_ptr")
    yield (
        feed_forward.feed_forward_bwd_weight_kernel,
        {**operands, "dy_ptr": POINTER[dtype], **dict.fromkeys(written, "*fp32")},
        {**options, **feed_forward.weight_config(*sizes)},
    )


def main(capability: int, widths: list[int]) -> None:
    # float16 compiles as bfloat16 does: the same sizes, the same tensor-core shapes
    dtypes = [(torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]
    for width, (dtype, precision), gated in itertools.product(widths, dtypes, (False, True)):
        if gated and dtype == torch.float32 and width > 128:
            continue  # refused
        for kernel, pointers, config in sources(width, dtype, gated, precision):
            compiled = compile_kernel(kernel, pointers, config, capability, (), ODD)
            report(kernel, compiled, width=width, dtype=str(dtype), precision=precision, gated=gated)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(x) for x in sys.argv[2:]])
