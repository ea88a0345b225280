"""The kernels of the frozen forward on a CUDA GPU, each against float64 first, then beside PyTorch and bitsandbytes.

Shapes are those of Llama-3-8B with 16,384 tokens, and of its decoding. Shares are of what the same GPU reaches in the
same run: a large copy's bytes a second, and the operations a second of PyTorch's bfloat16 product.

A time is that of a call in a CUDA graph of 16, so that no launch counts; those of a decoding product read 16 copies of
the weight in turn, which come from memory and not from the L2 cache.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.budget import assert_within_budget
from tests.ops.linear_cases import nf4, plain_nf4, plain_quantised, quantised
from tlfast.bench.measure import medians, timed_rounds
from tlfast.ops import norm_tap, quantise_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE, ROUNDS, CHECKED_ROWS = "cuda", 30, 64
TOKENS, WIDTH = 16384, 4096
COPIED = 2**28  # float32 numbers, beyond any cache
FP8 = torch.float8_e4m3fn
# outputs and inputs of a block's linear layers, gate and up projection in one
LAYERS = {"qkv": (6144, 4096), "out": (4096, 4096), "up": (28672, 4096), "down": (4096, 14336)}
DECODING, CALLS = (1, 16), 16
Call = Callable[[], Any]


def seconds_per_call(functions: dict[str, list[Call]]) -> dict[str, float]:
    """The median time of a call by name, of rounds in which all calls of a name run in one CUDA graph."""
    graphs = {name: _captured(calls) for name, calls in functions.items()}
    rounds = timed_rounds({name: graph.replay for name, graph in graphs.items()}, ROUNDS)
    return {name: seconds / len(functions[name]) for name, seconds in medians(rounds).items()}


def _captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and lets libraries allocate what they keep
            calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@functools.cache
def copy_rate() -> float:
    """Bytes a second that a large copy reaches here, read and written ones together."""
    source = torch.zeros(COPIED, device=DEVICE)
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds_per_call({"copy": [lambda: target.copy_(source)]})["copy"]


@pytest.mark.parametrize("quantise", [None, torch.int8, FP8], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["LayerNorm", "RMSNorm"])
def test_norm_tap(benchmark: Any, rms: bool, quantise: torch.dtype | None) -> None:
    _needs(quantise)
    x, residual = (torch.randn(TOKENS, WIDTH, device=DEVICE).bfloat16() for _ in range(2))
    weight, bias = torch.randn(WIDTH, device=DEVICE), None if rms else torch.randn(WIDTH, device=DEVICE)

    def ours() -> tuple[Any, ...]:
        return norm_tap(x, residual, weight, bias, rms=rms, quantise=quantise, impl="triton")

    some = slice(None, None, TOKENS // CHECKED_ROWS)
    exact = _norm(x[some].double() + residual[some].double(), weight.double(), bias, rms)
    plain = _norm((x[some] + residual[some]).float(), weight, bias, rms).bfloat16()
    assert_within_budget("norm_tap", ours()[1][some], plain, exact)
    moved = x.numel() * (8 if quantise is None else 9)
    what = (
        f"norm_tap, {'RMSNorm' if rms else 'LayerNorm'}, {'also ' + _name(quantise) if quantise else 'not quantised'}"
    )
    _record_share(benchmark, what, ours, lambda: F.rms_norm(x + residual, (WIDTH,)), moved)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_quantise_rows(benchmark: Any, dtype: torch.dtype) -> None:
    _needs(dtype)
    x = torch.randn(TOKENS, WIDTH, device=DEVICE).bfloat16()
    values, scale = quantise_rows(x[:CHECKED_ROWS], dtype=dtype, impl="triton")
    expected, expected_scale = quantise_rows(x[:CHECKED_ROWS].double(), dtype=dtype, impl="reference")
    torch.testing.assert_close(scale.double(), expected_scale.double(), rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    # a number halfway between two values may go to either, by the last bit of a float32 quotient
    assert (values.float() != expected.float()).float().mean() < 1e-3

    def plain() -> torch.Tensor:
        largest = x.abs().amax(-1, keepdim=True).float()
        return (x * (127 / largest)).round().to(dtype)

    _record_share(
        benchmark,
        f"quantise_rows to {_name(dtype)}",
        lambda: quantise_rows(x, dtype=dtype, impl="triton"),
        plain,
        3 * x.numel(),
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_quantised_linear(benchmark: Any, dtype: torch.dtype, name: str) -> None:
    from tlfast.ops.frozen_linear import triton_quantised as kernels

    _needs(dtype)
    launcher = kernels.int8_linear if dtype == torch.int8 else kernels.fp8_linear
    outputs, inputs = LAYERS[name]
    layer = quantised(TOKENS, outputs, inputs, dtype, bias=False, device=DEVICE)
    values, row_scale, weight, weight_scale, _ = layer

    def scaled() -> torch.Tensor:
        scales = {"scale_a": row_scale[:, None], "scale_b": weight_scale[None], "use_fast_accum": True}
        return torch._scaled_mm(values, weight.T, **scales, out_dtype=torch.bfloat16)

    def whole() -> torch.Tensor:
        return torch._int_mm(values, weight.T)

    def ours() -> torch.Tensor:
        return launcher(*layer, "none", torch.bfloat16)

    some = torch.arange(0, TOKENS, TOKENS // CHECKED_ROWS, device=DEVICE)
    exact = plain_quantised((values[some], row_scale[some], *layer[2:]), "none", torch.float64, torch.float64)
    plain = scaled()[some] if dtype == FP8 else exact.to(torch.bfloat16)
    assert_within_budget(f"{dtype} {name}", ours()[some], plain, exact)
    peers = {"torch._scaled_mm": [scaled] * CALLS} if dtype == FP8 else {"torch._int_mm (no scales)": [whole] * CALLS}
    _record_linear(benchmark, f"{_name(dtype)} linear", name, TOKENS, {"tlfast": [ours] * CALLS, **peers})


def test_rotation(benchmark: Any) -> None:
    """Of Llama-3-8B's queries, where they lie in the fused projection."""
    from tlfast.ops.packed_attention.triton_rotate import rotate

    heads, head_dim = WIDTH // 128, 128
    x = torch.randn(TOKENS, heads + 16, head_dim, device=DEVICE).bfloat16()[:, :heads]
    angles = torch.randn(TOKENS, head_dim // 2, device=DEVICE).repeat(1, 2)
    rotation = angles.cos(), angles.sin()

    def formula(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]

    few = [x[:CHECKED_ROWS], *(part[:CHECKED_ROWS] for part in rotation)]
    exact = formula(*(part.double() for part in few))
    assert_within_budget("rotation", rotate(x, *rotation)[:CHECKED_ROWS], formula(*few).bfloat16(), exact)
    moved = 4 * x.numel() + 8 * TOKENS * head_dim
    what = "rotation of queries"
    _record_share(benchmark, what, lambda: rotate(x, *rotation), lambda: formula(x, *rotation).bfloat16(), moved)


@pytest.mark.parametrize("name", ["qkv", "down"])
@pytest.mark.parametrize("rows", [*DECODING, TOKENS])
def test_int8_weight_linear(benchmark: Any, rows: int, name: str) -> None:
    """What nf4 does with query, key and value, and int8 with the last layer of the feed-forward."""
    from tlfast.ops.frozen_linear.triton_unpacked import int8_weight_linear

    x = torch.randn(rows, LAYERS[name][1], device=DEVICE).bfloat16()
    _, _, weight, scale, _ = quantised(1, *LAYERS[name], torch.int8, bias=False, device=DEVICE)
    copies = [weight.clone() for _ in range(_copies(rows))]

    def ours(weight: torch.Tensor = weight) -> torch.Tensor:
        return int8_weight_linear(x, weight, scale, None, "none")

    some = torch.arange(0, rows, max(1, rows // CHECKED_ROWS), device=DEVICE)
    exact = x[some].double() @ weight.double().T * scale.double()
    plain = F.linear(x[some], (weight.float() * scale[:, None]).bfloat16())
    assert_within_budget(f"int8 weight {name}", ours()[some], plain, exact)
    functions = {"tlfast": [functools.partial(ours, copy) for copy in copies]}
    _record_linear(benchmark, "int8 weight, bf16 linear", name, rows, functions)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [*DECODING, TOKENS])
def test_nf4_linear(benchmark: Any, rows: int, name: str) -> None:
    from tlfast.ops.frozen_linear.triton_unpacked import nf4_linear

    x, *weight = nf4(rows, *LAYERS[name], torch.bfloat16, bias=False, device=DEVICE)
    copies = [[None if part is None else part.clone() for part in weight] for _ in range(_copies(rows))]

    def ours(weight: list[torch.Tensor] = weight) -> torch.Tensor:
        return nf4_linear(x, *weight, "none")

    some = torch.arange(0, rows, max(1, rows // CHECKED_ROWS), device=DEVICE)
    few = (x[some], *weight)
    plain, exact = plain_nf4(few, "none", torch.bfloat16), plain_nf4(few, "none", torch.float64)
    assert_within_budget(f"nf4 {name}", ours()[some], plain, exact)
    functions = {"tlfast": [functools.partial(ours, copy) for copy in copies], **_bitsandbytes(x, LAYERS[name])}
    _record_linear(benchmark, "nf4 linear", name, rows, functions)


def _copies(rows: int) -> int:
    """How many weights take turns: as many as calls where reading them is what takes the time."""
    return CALLS if rows in DECODING else 1


def _norm(total: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rms: bool) -> torch.Tensor:
    if rms:
        return F.rms_norm(total, (WIDTH,), weight, 1e-5)
    return F.layer_norm(total, (WIDTH,), weight, None if bias is None else bias.to(total.dtype), 1e-5)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _needs(dtype: torch.dtype | None) -> None:
    if dtype == FP8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 products need compute capability 9.0")


def _bitsandbytes(x: torch.Tensor, size: tuple[int, int]) -> dict[str, list[Call]]:
    """Its nf4 product in groups of 64 with doubly quantised scales, where it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    calls: list[Call] = []
    for _ in range(_copies(x.shape[0])):
        weight = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        calls.append(functools.partial(bitsandbytes.matmul_4bit, x, packed.t(), quant_state=state))
    return {"bitsandbytes": calls}


def _record_share(
    benchmark: Any, what: str, ours: Callable[[], Any], plain: Callable[[], Any], moved_bytes: int
) -> None:
    """Times ours and plain PyTorch, and what share of a copy's bytes a second ours reaches."""
    seconds = seconds_per_call({"tlfast": [ours] * CALLS, "PyTorch": [plain] * CALLS})
    benchmark.pedantic(ours, rounds=ROUNDS)
    share = moved_bytes / seconds["tlfast"] / copy_rate()
    benchmark.extra_info.update(seconds=seconds, copy_bytes_per_second=copy_rate(), share_of_copy=share)
    benchmark.extra_info["row"] = {
        "what": f"{what}; {TOKENS} x {WIDTH}, bf16",
        "ours": f"{1e6 * seconds['tlfast']:.0f} us, {100 * share:.0f} % of a copy's {copy_rate() / 1e12:.2f} TB/s",
        "peer": f"PyTorch, eager, {1e6 * seconds['PyTorch']:.0f} us",
        "how": "tlfast bench frozen_kernels",
    }


def _record_linear(benchmark: Any, what: str, name: str, rows: int, functions: dict[str, list[Call]]) -> None:
    """Times ours, PyTorch's bfloat16 product of the same layer, and the peers."""
    outputs, inputs = LAYERS[name]
    x = torch.randn(rows, inputs, device=DEVICE).bfloat16()
    weights = [torch.randn(outputs, inputs, device=DEVICE).bfloat16() for _ in range(_copies(rows))]
    bf16 = "F.linear in bf16"
    seconds = seconds_per_call({**functions, bf16: [functools.partial(F.linear, x, weight) for weight in weights]})
    benchmark.pedantic(functions["tlfast"][0], rounds=ROUNDS)
    rates = {key: 2 * rows * inputs * outputs / value / 1e12 for key, value in seconds.items()}
    benchmark.extra_info.update(seconds=seconds, teraflops=rates, speed=seconds[bf16] / seconds["tlfast"])
    figures = {key: f"{1e6 * value:.0f} us, {rates[key]:.0f} TFLOP/s" for key, value in seconds.items()}
    benchmark.extra_info["row"] = {
        "what": f"{what}, Llama-3-8B {name}: {rows} x {inputs} to {outputs}",
        "ours": f"{figures.pop('tlfast')}, {benchmark.extra_info['speed']:.2f} x F.linear in bf16",
        "peer": "; ".join(f"{key} {figure}" for key, figure in figures.items()),
        "how": "tlfast bench frozen_kernels",
    }
