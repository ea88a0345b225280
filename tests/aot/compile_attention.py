"""Compiles every kernel of attention ahead of time and prints one JSON line each; run by test_aot_attention.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from tests.aot.compiling import POINTER, compile_kernel, report
from tlfast.ops._triton import block_r
from tlfast.ops.attention import triton as forward
from tlfast.ops.attention import triton_backward as backward
from tlfast.ops.attention.triton_tiles import NOT_SPECIALISED


@dataclass(frozen=True)
class Variant:
    """Inputs of a dtype, and which of the kernels' branches they take."""

    dtype: torch.dtype
    head_dim: int
    causal: bool
    mask_and_dropout: bool
    precision: str = "ieee"


# few, since a continuous integration's time is short: the narrow heads, everything at once, and float32
VARIANTS = {
    "narrow": Variant(torch.bfloat16, 8, causal=True, mask_and_dropout=False),
    "wide": Variant(torch.bfloat16, 64, causal=False, mask_and_dropout=True),
    "float32": Variant(torch.float32, 16, causal=True, mask_and_dropout=False),
}


def sources(variant: Variant):
    """(kernel, pointer types by argument, constexprs with launch options) of each kernel."""
    x, size = POINTER[variant.dtype], variant.dtype.itemsize
    pointers = {f"{name}_ptr": x for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    pointers |= {
        "key_mask_ptr": "*u8",
        "seed_ptr": "*i64",
        "statistics_ptr": "*fp32",
        "delta_ptr": "*fp32",
        "row_keys_ptr": "*i32",
    }
    constants = {
        "CAUSAL": variant.causal,
        "HAS_MASK": variant.mask_and_dropout,
        "DROPOUT": variant.mask_and_dropout,
        "PRECISION": variant.precision,
        "UNIT": 16 // size,
        "HEAD_DIM": variant.head_dim,
        "BLOCK_D": block_r(variant.head_dim),
    }
    configs = {
        forward.attention_fwd_kernel: forward.forward_config,
        backward.attention_bwd_dq_kernel: backward.dq_config,
        backward.attention_bwd_dkv_kernel: backward.dkv_config,
    }
    for kernel, config in configs.items():
        yield kernel, pointers, constants | config(variant.head_dim, size)


def main(capability: int, names: list[str]) -> None:
    for name in names:
        for kernel, pointers, config in sources(VARIANTS[name]):
            floats = ("scale", "scale_log2", "kept_share")
            compiled = compile_kernel(kernel, pointers, config, capability, floats, NOT_SPECIALISED)
            report(kernel, compiled, variant=name)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
