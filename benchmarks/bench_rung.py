"""The rung beside plain PyTorch, eager and compiled, forward and with backward, on the GPU where there is one.

All run interleaved in one process on the same inputs, agreement checked first. The floor is the time this machine needs
to move the bytes that any implementation must: h once in each direction, s, z, dz, ds and the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tlfast.bench.measure import hook_bytes, medians, timed_rounds
from tlfast.ops import rung

ROUNDS = 30
TEMPERATURE = 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rows, width of the backbone, width of the side network, dtypes of tap and side state
SHAPES = {
    "cpu": [(2048, 768, 96, torch.float32, torch.float32), (2048, 768, 96, torch.bfloat16, torch.float32)],
    "cuda": [
        (16384, 768, 96, torch.bfloat16, torch.float32),
        (16384, 4096, 256, torch.bfloat16, torch.bfloat16),
        (16384, 4096, 256, torch.bfloat16, torch.float32),
        (16384, 768, 96, torch.float32, torch.float32),
    ],
}[DEVICE]
IMPLEMENTATIONS = {"cpu": ["native"], "cuda": ["triton", "cuda"]}[DEVICE]


def plain(
    h: torch.Tensor, s: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """What one writes without the library."""
    mu = torch.sigmoid(alpha / TEMPERATURE)
    return mu * s + (1 - mu) * F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).to(s.dtype)


def copy_bytes_per_second() -> float:
    """What a large copy reaches here, read and written bytes together."""
    source = torch.zeros(2**28 if DEVICE == "cuda" else 2**25, device=DEVICE)
    target = torch.empty_like(source)
    return 8 * source.numel() / medians(timed_rounds({"copy": lambda: target.copy_(source)}, 10))["copy"]


def floors(rows: int, width: int, side: int, h_bytes: int, s_bytes: int) -> dict[str, int]:
    """Fewest bytes: forward h, s, z and the weight; the step also h again, z again, dz, s again, ds and dweight."""
    forward = rows * width * h_bytes + 2 * rows * side * s_bytes + side * width * h_bytes
    return {"forward": forward, "step": 2 * rows * width * h_bytes + 6 * rows * side * s_bytes + 2 * side * width * 4}


@pytest.mark.parametrize("rows, width, side, h_dtype, s_dtype", SHAPES, ids=str)
def test_rung(benchmark: Any, rows: int, width: int, side: int, h_dtype: torch.dtype, s_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h = torch.randn(rows, width, device=DEVICE).to(h_dtype)
    s = torch.randn(rows, side, device=DEVICE).to(s_dtype).requires_grad_()
    weight = (torch.randn(side, width, device=DEVICE) / width**0.5).requires_grad_()
    bias, alpha = torch.randn(side, device=DEVICE).requires_grad_(), torch.zeros(side, device=DEVICE).requires_grad_()
    inputs, trained = (h, s, weight, bias, alpha), (s, weight, bias, alpha)
    dz = torch.randn(rows, side, device=DEVICE).to(s_dtype)
    compiled = torch.compile(plain, fullgraph=True)
    functions: dict[str, Callable[[], torch.Tensor]] = {
        impl: lambda impl=impl: rung(*inputs, temperature=TEMPERATURE, impl=impl) for impl in IMPLEMENTATIONS
    }
    functions |= {"PyTorch": lambda: plain(*inputs), "torch.compile": lambda: compiled(*inputs)}

    def step(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(function(), trained, dz)

    tolerance = 1e-4 if h_dtype == s_dtype == torch.float32 else 4e-2
    for impl in IMPLEMENTATIONS:
        for ours, theirs in zip(step(functions[impl]), step(functions["PyTorch"]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())

    runs: dict[str, Callable[[], Any]] = {f"{name}, forward": function for name, function in functions.items()}
    runs |= {f"{name}, step": lambda f=function: step(f) for name, function in functions.items()}
    seconds = medians(timed_rounds(runs, ROUNDS))
    benchmark.pedantic(runs[f"{IMPLEMENTATIONS[0]}, step"], rounds=ROUNDS)
    floor, speed = floors(rows, width, side, h_dtype.itemsize, s_dtype.itemsize), copy_bytes_per_second()
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["saved_bytes"] = {name: hook_bytes(function) for name, function in functions.items()}
    benchmark.extra_info["floor_bytes"] = floor
    benchmark.extra_info["copy_bytes_per_second"] = speed
    benchmark.extra_info["times_the_floor"] = {
        run: time * speed / floor[run.rpartition(", ")[2]] for run, time in seconds.items()
    }
    benchmark.extra_info["row"] = row(benchmark.extra_info, f"Rung {rows} x {width} to {side}", h_dtype, s_dtype)


def row(info: dict[str, Any], what: str, h_dtype: torch.dtype, s_dtype: torch.dtype) -> dict[str, str]:
    """The README's line: forward and step of each, and how near the floor ours comes."""
    milliseconds = {run: f"{1e3 * time:.3g}" for run, time in info["seconds"].items()}
    figures = {
        name: f"{milliseconds[f'{name}, forward']} / {milliseconds[f'{name}, step']} ms, "
        f"keeps {info['saved_bytes'][name] / 2**20:.2f} MiB"
        for name in (*IMPLEMENTATIONS, "PyTorch", "torch.compile")
    }
    ours = "; ".join(
        f"{name} {figures.pop(name)}, {info['times_the_floor'][f'{name}, forward']:.1f} / "
        f"{info['times_the_floor'][f'{name}, step']:.1f} x the floor"
        for name in IMPLEMENTATIONS
    )
    dtypes = f"{str(h_dtype).removeprefix('torch.')} tap, {str(s_dtype).removeprefix('torch.')} side"
    return {
        "what": f"{what}, {dtypes} (forward / step)",
        "ours": ours,
        "peer": "; ".join(f"{name} {figure}" for name, figure in figures.items()),
        "how": "tlfast bench rung",
    }
