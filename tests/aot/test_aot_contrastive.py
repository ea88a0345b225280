"""The Triton kernels of the contrastive losses compiled for each GPU generation, without a GPU."""

from __future__ import annotations

import itertools

KERNELS = [f"contrastive_{form}_{way}_kernel" for form in ("softmax", "sigmoid") for way in ("fwd", "bwd")]
DTYPES = ["torch.float32", "torch.bfloat16", "torch.float16"]


def test_compiles_without_spills(compiled_kernels):
    rows = compiled_kernels("compile_contrastive")
    found = {(row["kernel"], row["dtype"], row["odd"]) for row in rows}
    assert found == set(itertools.product(KERNELS, DTYPES, (False, True)))
