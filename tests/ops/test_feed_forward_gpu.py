"""The feed-forward on a GPU: products and the kernels between them against float64, within PyTorch's own error."""

from __future__ import annotations

import pytest
import torch

import tlfast
from tests.ops.feed_forward_cases import ACTIVATIONS, assert_accurate, make, run
from tlfast.backbone.parts import BlockSpec
from tlfast.ladder.blocks import SideFeedForward
from tlfast.ops import feed_forward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((1,), 16, 16), ((2, 63), 48, 192), ((3, 1365), 96, 384), ((65,), 256, 896), ((100,), 1, 1), ((), 63, 65)]


def cases(*args, **kwargs):
    return [make(*args, **kwargs, device="cuda", seed=seed) for seed in range(4)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, width, hidden", SHAPES)
def test_accuracy(shape, width, hidden, dtype, gated):
    assert_accurate(cases(shape, width, hidden, dtype, gated), "triton")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated):
    assert_accurate(cases((4, 300), 96, 384, torch.bfloat16, gated, bias=False), "triton", activation)


def test_strided_views():
    torch.manual_seed(0)
    _, *weights = make((4, 6), 24, 10, device="cuda")
    dy = torch.randn(6, 4, 24, device="cuda").transpose(0, 1)
    columns, rows = torch.randn(4, 6, 60, device="cuda")[..., 7:31], torch.randn(4, 9, 24, device="cuda")[:, 2:8]
    views = [columns, rows, torch.randn(4, 24, 6, device="cuda").mT]
    assert not any(view.is_contiguous() for view in (*views, dy))
    assert_accurate([(view.requires_grad_(), *weights) for view in views], "triton", dy=dy)


def test_the_same_bits_every_time():
    inputs = make((3, 1365), 96, 384, torch.bfloat16, device="cuda")
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    _, *weights = make((3,), 64, 128, torch.bfloat16, device="cuda")
    x = torch.zeros(2 * 2**30 + 64, dtype=torch.bfloat16, device="cuda").as_strided((3, 64), (2**30, 1))
    x.normal_()
    first, second = (run((each.detach().requires_grad_(), *weights), "triton") for each in (x, x.clone()))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("gated", [True, False])
def test_opcheck(gated):
    inputs = [None if x is None else x.detach() for x in make((2, 5), 32, 16, torch.bfloat16, gated, device="cuda")]
    torch.library.opcheck(torch.ops.tlfast.feed_forward_fwd, (*inputs, "gelu"))
    dy = torch.ones_like(inputs[0])
    torch.library.opcheck(torch.ops.tlfast.feed_forward_bwd, (dy, *inputs, "gelu", True, True))


def test_compiles_into_one_graph():
    torch.compiler.reset()
    inputs = make((2, 50), 48, 96, device="cuda", gated=True)

    @torch.compile(fullgraph=True)
    def layer(*inputs):
        return torch.tanh(feed_forward(*inputs))

    ours = torch.autograd.grad(layer(*inputs).sum(), inputs)
    eager = torch.autograd.grad(torch.tanh(feed_forward(*inputs, impl="reference")).sum(), inputs)
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_auto_takes_triton():
    assert tlfast.ops.describe()["feed_forward"]["auto"] == "triton"
    inputs = make((2, 5), 32, 16, torch.bfloat16, device="cuda")
    assert torch.equal(feed_forward(*inputs), feed_forward(*inputs, impl="triton"))


@pytest.mark.parametrize("gated", [True, False])
def test_a_side_block_takes_it_under_autocast(gated):
    spec = BlockSpec(width=96, heads=4, kv_heads=4, head_dim=24, hidden=384, activation="gelu_new", gated=gated)
    layer = SideFeedForward(spec).cuda()
    x = torch.randn(2, 50, 96, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
        weights = [p for part in (layer.up, layer.down) for p in (part.weight, part.bias)]
        gate = (layer.gate.weight, layer.gate.bias) if gated else ()
        assert torch.equal(y, feed_forward(x, *weights, *gate, activation="gelu_tanh", impl="triton"))
    assert y.dtype == torch.bfloat16
