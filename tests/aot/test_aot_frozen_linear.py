"""Every Triton kernel of frozen linear layers, with every tile it may take, compiled for each GPU generation."""

from __future__ import annotations

import json


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_frozen_linear")
    tiles = {(row["kernel"], row["activation"], row["gated"], json.dumps(row["tile"])) for row in rows}

    def count(activation, gated):
        kernels = [kernel for kernel, act, gate, _ in tiles if (act, gate) == (activation, gated)]
        return {kernel: kernels.count(kernel) for kernel in set(kernels) - {"fp8_linear_fwd_kernel"}}

    plain, gated = count("gelu", False), count("gelu_tanh", True)
    # with sums in float32, tiles of float32 inputs are others
    expected = {"int8_linear_fwd_kernel": 6, "nf4_linear_fwd_kernel": 7, "int8_weight_linear_fwd_kernel": 8}
    assert plain == expected | {"activate_fwd_kernel": 1}
    assert gated == {"int8_linear_fwd_kernel": 6, "nf4_linear_fwd_kernel": 5, "int8_weight_linear_fwd_kernel": 6}
    fp8 = sum(kernel == "fp8_linear_fwd_kernel" and act in ("gelu", "gelu_tanh") for kernel, act, _, _ in tiles)
    assert fp8 in (0, 12)
