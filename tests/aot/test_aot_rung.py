"""Every Triton kernel of the rung compiled for each GPU generation, without a GPU."""

from __future__ import annotations

WIDTHS = (48, 96, 192, 512)
KERNELS = {"rung_fwd_kernel", "rung_bwd_kernel", "rung_bwd_weight_kernel"}


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_rung", *WIDTHS)
    assert {(row["kernel"], row["width"]) for row in rows} == {(k, w) for k in KERNELS for w in WIDTHS}
