"""Compiles every kernel of the rung ahead of time and prints one JSON line each; run by test_aot_rung.py.

A process of its own, since TRITON_INTERPRET must not be set where kernels are compiled.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tlfast.ops.rung import triton as rung

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CONFIG_KEYS = ("num_warps", "num_stages")


def sources(width: int, h_dtype: torch.dtype, s_dtype: torch.dtype, precision: str):
    """(name, kernel, pointer types by argument, constexprs, launch options) of each kernel at one width."""
    h, s = POINTER[h_dtype], POINTER[s_dtype]
    gates = {"alpha_ptr": "*fp32"}
    shape = {"BLOCK_R": rung.block_r(width), "PER_CHANNEL": True}
    size = h_dtype.itemsize
    yield (
        rung.rung_fwd_kernel,
        {"h_ptr": h, "s_ptr": s, "weight_ptr": h, "bias_ptr": "*fp32", "z_ptr": s, **gates},
        {**shape, "HAS_BIAS": True, "PRECISION": precision, **rung.forward_config(width, size)},
    )
    yield (
        rung.rung_bwd_weight_kernel,
        {"dz_ptr": s, "h_ptr": h, "dweight_ptr": "*fp32", **gates},
        {**shape, "PRECISION": precision, **rung.weight_config(width, size)},
    )
    yield (
        rung.rung_bwd_kernel,
        {"dz_ptr": s, "s_ptr": s, "z_ptr": s, "ds_ptr": s, "dbias_ptr": "*fp32", "dalpha_ptr": "*fp32", **gates},
        {**shape, "NEED_DS": True, "NEED_DBIAS": True, "NEED_DALPHA": True, **rung.sums_config(width)},
    )


def signature(kernel, pointers: dict[str, str], constexprs: dict) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        else:
            types[name] = pointers.get(name, "fp32" if name == "temperature" else "i32")
    return types


def compile_kernel(kernel, pointers: dict[str, str], config: dict, capability: int):
    options = {key: config[key] for key in CONFIG_KEYS}
    constexprs = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    types = signature(kernel, pointers, constexprs)
    # what the launcher tells the compiler of real tensors: pointers and sizes are multiples of 16
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind == "i32" and name not in ("M", "inner_rows"))
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of local memory (spills) of a kernel, as cuobjdump reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert usage, text
    return {"registers": int(usage[1]), "stack": int(usage[2]), "local": int(usage[3])}


def main(capabilities: list[int], widths: list[int]) -> None:
    # float16 compiles as bfloat16 does: the same sizes, the same tensor-core shapes
    dtypes = [
        (torch.bfloat16, torch.float32, "ieee"),
        (torch.bfloat16, torch.bfloat16, "ieee"),
        (torch.float32, torch.float32, "ieee"),
        (torch.float32, torch.float32, "tf32"),
    ]
    for width, (h_dtype, s_dtype, precision) in itertools.product(widths, dtypes):
        for kernel, pointers, config in sources(width, h_dtype, s_dtype, precision):
            if precision == "tf32" and kernel is rung.rung_bwd_kernel:
                continue  # it multiplies no matrices
            for capability in capabilities:
                compiled = compile_kernel(kernel, pointers, config, capability)
                row = {"kernel": kernel.__name__, "width": width, "h": str(h_dtype), "s": str(s_dtype)}
                row |= {"precision": precision, "capability": capability, "shared": compiled.metadata.shared}
                print(json.dumps(row | resources(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main([int(x) for x in sys.argv[1].split(",")], [int(x) for x in sys.argv[2].split(",")])
