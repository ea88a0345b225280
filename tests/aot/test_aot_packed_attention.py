"""The kernel that rotates queries and keys, compiled for each GPU generation."""

from __future__ import annotations


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_packed_attention")
    assert {row["kernel"] for row in rows} == {"rotate_fwd_kernel"} and len(rows) == 8
