"""Inputs and runs that the tests of the feed-forward share."""

from __future__ import annotations

import torch

from tests.budget import assert_within_budget
from tlfast.ops import feed_forward

NAMES = ("dx", "dup_weight", "dup_bias", "ddown_weight", "ddown_bias", "dgate_weight", "dgate_bias")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")

Inputs = tuple[torch.Tensor | None, ...]


def make(
    shape: tuple[int, ...],
    width: int,
    hidden: int,
    dtype: torch.dtype = torch.float32,
    gated: bool = False,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """x, then weight and bias of up, down and gate, as `feed_forward` takes them; hidden channels of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    up, down = normal(hidden, width) / max(width, 1) ** 0.5, normal(width, hidden) / max(hidden, 1) ** 0.5
    gate = normal(hidden, width) / max(width, 1) ** 0.5
    biases = normal(hidden), normal(width), normal(hidden)
    up_bias, down_bias, gate_bias = biases if bias else (None, None, None)
    inputs = (normal(*shape, width), up, up_bias, down, down_bias, *((gate, gate_bias) if gated else (None, None)))
    return tuple(None if x is None else x.to(device, dtype).requires_grad_() for x in inputs)


def some_dy(x: torch.Tensor) -> torch.Tensor:
    """A gradient for y, exactly representable in its dtype."""
    return torch.cos(torch.arange(x.numel(), device=x.device)).view(x.shape).to(x.dtype)


def run(inputs: Inputs, impl: str, activation: str = "gelu", dy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    y = feed_forward(*inputs, activation=activation, impl=impl)
    wanted = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(y, wanted, some_dy(y.detach()) if dy is None else dy))
    named = {name: next(grads) for name, x in zip(NAMES, inputs, strict=True) if x is not None}
    return {"y": y.detach()} | named


def in_float64(inputs: Inputs) -> Inputs:
    return tuple(None if x is None else x.detach().double().requires_grad_() for x in inputs)


def assert_accurate(cases: list[Inputs], impl: str, activation: str = "gelu", dy: torch.Tensor | None = None) -> None:
    """Errors are pooled over the cases, and may be a rounding of a result's largest number: luck can be exact."""
    pooled: dict[str, list[list[torch.Tensor]]] = {}
    for inputs in cases:
        given = some_dy(inputs[0].detach()) if dy is None else dy
        ours, plain = (run(inputs, each, activation, given) for each in (impl, "reference"))
        exact = run(in_float64(inputs), "reference", activation, given.double())
        for name in ours:
            assert ours[name].shape == plain[name].shape, name
            right = exact[name]
            rounding = torch.finfo(ours[name].dtype).eps * (right.abs().max() if right.numel() else right.sum())
            pooled.setdefault(name, []).append([ours[name], plain[name], right, rounding.expand(right.shape)])
    for name, results in pooled.items():
        assert_within_budget(f"{impl} {name}", *(torch.stack(tensors) for tensors in zip(*results, strict=True)))
