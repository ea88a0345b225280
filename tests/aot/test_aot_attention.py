"""Every Triton kernel of attention compiled for each GPU generation, without a GPU."""

from __future__ import annotations

VARIANTS = ("narrow", "wide", "float32")
KERNELS = ("attention_fwd_kernel", "attention_bwd_dq_kernel", "attention_bwd_dkv_kernel")


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_attention", *VARIANTS)
    assert {(row["kernel"], row["variant"]) for row in rows} == {(k, v) for k in KERNELS for v in VARIANTS}
