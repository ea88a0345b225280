"""The feed-forward of a side block is its operation: on the CPU, bit for bit what its layers give."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from tlfast.backbone.parts import BlockSpec
from tlfast.ladder import blocks
from tlfast.ladder.blocks import ACTIVATIONS, SideFeedForward


def layers(module: SideFeedForward, x: torch.Tensor) -> torch.Tensor:
    """As linear layers compute it one after the other."""
    if module.gate is None:
        return module.down(module.activation(module.up(x)))
    return module.down(module.activation(module.gate(x)) * module.up(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gated, bias", [(False, True), (True, False)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_bits_as_its_layers(activation, gated, bias, autocast):
    torch.manual_seed(0)
    spec = BlockSpec(
        width=24, heads=4, kv_heads=4, head_dim=6, hidden=40, activation=activation, gated=gated, bias=bias
    )
    module, x, dy = SideFeedForward(spec), torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 24)
    found = []
    for function in (module, lambda x: layers(module, x)):
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            y = function(x)
        found.append([y, *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))])
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


def test_it_calls_the_operation(monkeypatch):
    called = []
    monkeypatch.setattr(blocks, "feed_forward", lambda x, *weights, activation: called.append((weights, activation)))
    spec = BlockSpec(width=24, heads=4, kv_heads=4, head_dim=6, hidden=40, activation="gelu_new", gated=True)
    module = SideFeedForward(spec)
    module(torch.randn(3, 7, 24))
    ((weights, activation),) = called
    expected = [p for layer in (module.up, module.down, module.gate) for p in (layer.weight, layer.bias)]
    assert activation == "gelu_tanh" and all(a is b for a, b in zip(weights, expected, strict=True))
    assert all(isinstance(p, nn.Parameter) for p in weights)
