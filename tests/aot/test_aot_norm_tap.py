"""The Triton kernels of norm_tap and quantise_rows compiled for each GPU generation, without a GPU."""

from __future__ import annotations

WIDTHS = (48, 384, 768, 2048, 4096, 8192, 16384)
KERNELS = {"norm_tap_fwd_kernel", "quantise_rows_fwd_kernel"}


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_norm_tap", *WIDTHS)
    assert {(row["kernel"], row["width"]) for row in rows} == {(k, w) for k in KERNELS for w in WIDTHS}
    formats = {row["quantised"] for row in rows}
    assert {"None", "torch.int8"} <= formats
