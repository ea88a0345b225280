"""The feed-forward inside PyTorch's machinery: operator checks, torch.compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.ops.feed_forward_cases import make, run
from tests.ops.interpreter import interpreted
from tlfast.ops import feed_forward

IMPLS = ["reference", pytest.param("triton", marks=interpreted)]


@interpreted
@pytest.mark.parametrize("gated, bias", [(False, True), (True, True), (False, False)])
def test_opcheck(gated, bias):
    inputs = [None if x is None else x.detach() for x in make((2, 5), 12, 8, gated=gated, bias=bias)]
    torch.library.opcheck(torch.ops.tlfast.feed_forward_fwd, (*inputs, "gelu"))
    dy = torch.ones_like(inputs[0])
    for need_dx, need_dweights in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.tlfast.feed_forward_bwd, (dy, *inputs, "gelu", need_dx, need_dweights))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_into_one_graph(impl):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x, *weights):
        return torch.tanh(feed_forward(x * 2, *weights, impl=impl))

    for rows in (5, 9):
        inputs = make((2, rows), 12, 8, gated=True)
        grads = torch.autograd.grad(layer(*inputs).sum(), inputs)
        eager = torch.tanh(feed_forward(inputs[0] * 2, *inputs[1:], impl="reference"))
        for ours, expected in zip(grads, torch.autograd.grad(eager.sum(), inputs), strict=True):
            torch.testing.assert_close(ours, expected)


@interpreted
def test_autocast_casts_everything():
    # biases, which are added in float32, are those of float16 from the start; the interpreter has no bfloat16
    inputs = [x.detach().half().float() if x.dim() == 1 else x.detach() for x in make((3, 7), 12, 8, gated=True)]
    inputs = tuple(x.requires_grad_() for x in inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        cast = run(inputs, "triton")
    assert cast["y"].dtype == torch.float16
    half = tuple(x.detach().half().requires_grad_() for x in inputs)
    for name, expected in run(half, "triton").items():
        assert cast[name].dtype == (torch.float16 if name == "y" else torch.float32), name
        torch.testing.assert_close(cast[name].half(), expected, rtol=0, atol=0)


def test_the_reference_under_autocast_is_what_two_linears_give():
    x, up, up_bias, down, down_bias, *_ = make((3, 7), 12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = feed_forward(x, up, up_bias, down, down_bias, impl="reference")
        assert torch.equal(ours, F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias))
    assert ours.dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    inputs = tuple(None if x is None else x.detach().double() for x in make((3,), 12, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feed_forward(*inputs, impl="reference"), feed_forward(*inputs))


@interpreted
def test_a_checkpoint_gives_the_same():
    inputs = make((5,), 12, 8)
    y = checkpoint(lambda x: feed_forward(x.sin(), *inputs[1:], impl="triton"), inputs[0], use_reentrant=False)
    y.sum().backward()
    plain = feed_forward(inputs[0].sin(), *inputs[1:], impl="triton")
    for x, expected in zip(inputs[:5], torch.autograd.grad(plain.sum(), inputs[:5]), strict=True):
        assert torch.equal(x.grad, expected)


@interpreted
def test_without_a_gradient_the_kernel_is_called_as_it_is():
    inputs = make((5,), 12, 8)
    with torch.no_grad():
        y = feed_forward(*inputs, impl="triton")
    assert not y.requires_grad
    assert torch.equal(y, feed_forward(*inputs, impl="triton"))
