"""The Triton kernel of linear_cross_entropy compiled for each GPU generation, without a GPU."""

from __future__ import annotations

# vocabulary and numbers from a row to the next: one block; whole rows; padded ones; ones that begin anywhere
SIZES = ("64:64", "128256:128256", "50257:50272", "50257:50257")


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_linear_cross_entropy", *SIZES)
    assert {row["size"] for row in rows} == set(SIZES)
    assert len(rows) == len(SIZES) * 2**3
