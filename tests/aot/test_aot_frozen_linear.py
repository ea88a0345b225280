"""Every Triton kernel of frozen linear layers, with every tile it may take, compiled for each GPU generation."""

from __future__ import annotations

import json


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_frozen_linear")
    tiles = {(row["kernel"], row["activation"], json.dumps(row["tile"])) for row in rows}
    count = {name: sum(kernel == name and act == "gelu" for kernel, act, _ in tiles) for name, _, _ in tiles}
    assert count.pop("fp8_linear_fwd_kernel", 6) == 6
    assert count == {"int8_linear_fwd_kernel": 6, "nf4_linear_fwd_kernel": 7}
