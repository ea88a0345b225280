"""The side network's operations beside plain PyTorch: attention (scaled_dot_product_attention), sum and norm, float32.

Forward and forward + backward, interleaved with the peers in one process on the same inputs, agreement checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tlfast.bench.measure import hook_bytes, medians, timed_rounds
from tlfast.ops import add_norm, attention, prenorm

ROUNDS = 11
SEED = 7
# (batch, length, heads, head size): bert-base reduced by 8, the same longer, and two wider heads
ATTENTION_SHAPES = [(16, 128, 12, 8), (4, 512, 12, 8), (16, 128, 12, 32), (16, 128, 12, 64)]


def compare(benchmark: Any, what: str, functions: dict[str, Callable[[], torch.Tensor]], floor_bytes: int) -> None:
    """Times functions (the first is ours), forward and with backward; records seconds and kept bytes."""
    steps = {f"{name}, forward": function for name, function in functions.items()}
    steps |= {f"{name}, step": lambda f=function: f().sum().backward() for name, function in functions.items()}
    seconds = medians(timed_rounds(steps, ROUNDS))
    ours = next(iter(functions))
    benchmark.pedantic(steps[f"{ours}, step"], rounds=ROUNDS)
    kept = {name: hook_bytes(function) for name, function in functions.items()}
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["saved_bytes"] = kept
    benchmark.extra_info["forward_floor_bytes_per_second"] = floor_bytes / seconds[f"{ours}, forward"]
    figures = {
        name: f"{1e3 * seconds[f'{name}, forward']:.2f} + "
        f"{1e3 * (seconds[f'{name}, step'] - seconds[f'{name}, forward']):.2f} ms, keeps {kept[name] / 2**20:.2f} MiB"
        for name in functions
    }
    benchmark.extra_info["row"] = {
        "what": f"{what} (forward + backward)",
        "ours": figures.pop(ours),
        "peer": "; ".join(f"{name} {figure}" for name, figure in figures.items()),
        "how": "tlfast bench side_ops",
    }


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_attention(benchmark: Any, shape: tuple[int, int, int, int], dropout_p: float) -> None:
    batch, length, heads, width = shape
    packed = torch.randn(batch, length, 3, heads, width, requires_grad=True)

    def ours(p: float = dropout_p) -> torch.Tensor:
        return attention(*packed.unbind(2), dropout_p=p, seed=SEED)

    def sdpa(p: float = dropout_p) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2)

    def checkpointed() -> torch.Tensor:
        return checkpoint(sdpa, use_reentrant=False)

    torch.testing.assert_close(ours(0.0), sdpa(0.0), rtol=1e-5, atol=1e-5)
    functions = {"ours": ours, "sdpa": sdpa, "checkpointed sdpa": checkpointed}
    compare(benchmark, f"Attention {shape}, dropout {dropout_p}", functions, 4 * 4 * batch * length * heads * width)


@pytest.mark.parametrize("bias_gradient", [True, False])
def test_attention_with_position_bias(benchmark: Any, bias_gradient: bool) -> None:
    batch, length, heads, width = 16, 128, 12, 8
    packed = torch.randn(batch, length, 3, heads, width, requires_grad=True)
    bias = torch.randn(1, heads, length, length, requires_grad=bias_gradient)

    def ours() -> torch.Tensor:
        return attention(*packed.unbind(2), bias=bias)

    def sdpa() -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    torch.testing.assert_close(ours(), sdpa(), rtol=1e-5, atol=1e-5)
    floor = 4 * (4 * batch * length * heads * width + bias.numel())
    what = f"Attention with a bias{' that trains' if bias_gradient else ''}, {(batch, length, heads, width)}"
    compare(benchmark, what, {"ours": ours, "sdpa": sdpa}, floor)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2048, 96), (2048, 768)], ids=str)
def test_add_norm(benchmark: Any, shape: tuple[int, int], dropout_p: float) -> None:
    rows, width = shape
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(width, requires_grad=True) for _ in range(2))

    def ours(p: float = dropout_p) -> torch.Tensor:
        return add_norm(x, residual, weight, bias, eps=1e-12, dropout_p=p, seed=SEED)

    def plain(p: float = dropout_p) -> torch.Tensor:
        return F.layer_norm(residual + F.dropout(x, p), (width,), weight, bias, 1e-12)

    torch.testing.assert_close(ours(0.0), plain(0.0), rtol=1e-5, atol=1e-5)
    compare(
        benchmark, f"Add & norm {shape}, dropout {dropout_p}", {"ours": ours, "PyTorch": plain}, 4 * 4 * rows * width
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(2048, 96), (2048, 768)], ids=str)
def test_prenorm(benchmark: Any, shape: tuple[int, int], norm: str, dropout_p: float) -> None:
    rows, width = shape
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.randn(width, requires_grad=True)
    peer_norm = {"layer": F.layer_norm, "rms": F.rms_norm}[norm]

    # u + y stands for what follows: both outputs are used
    def ours(p: float = dropout_p) -> torch.Tensor:
        u, y = prenorm(x, residual, weight, eps=1e-6, norm=norm, dropout_p=p, seed=SEED)
        return u + y

    def plain(p: float = dropout_p) -> torch.Tensor:
        u = residual + F.dropout(x, p)
        return u + peer_norm(u, (width,), weight=weight, eps=1e-6)

    torch.testing.assert_close(ours(0.0), plain(0.0), rtol=1e-5, atol=1e-5)
    functions = {"ours": ours, "PyTorch": plain}
    compare(benchmark, f"Pre-norm ({norm}) {shape}, dropout {dropout_p}", functions, 7 * 4 * rows * width)
