"""Compiles a Triton kernel ahead of time, without a GPU; what the compile_*.py scripts share.

They run in processes of their own (conftest.py), since TRITON_INTERPRET must not be set where kernels are compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float8_e4m3fn: "*fp8e4nv",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages")


def compile_kernel(
    kernel, pointers: dict[str, str], config: dict, capability: int, floats: Collection[str], odd: Collection[str]
):
    """Compiles a kernel with these pointer types and constants; its other arguments are integers.

    `floats` names its float arguments, `odd` the integers that need not be multiples of 16; other integers, and all
    pointers, the compiler may take for multiples of 16, as the launcher tells it of real tensors.
    """
    options = {key: config[key] for key in LAUNCH_OPTIONS}
    constexprs = {key: value for key, value in config.items() if key not in LAUNCH_OPTIONS}
    types = {
        name: "constexpr" if name in constexprs else pointers.get(name, "fp32" if name in floats else "i32")
        for name in kernel.arg_names
    }
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind == "i32" and name not in odd)
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


def report(kernel, compiled, **case: object) -> None:
    """Prints what a kernel takes as one JSON line, with what tells its case from others."""
    row = {"kernel": kernel.__name__, **case, "shared": compiled.metadata.shared}
    print(json.dumps(row | resources(compiled.asm["cubin"])), flush=True)
