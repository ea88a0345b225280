"""The rung inside PyTorch's machinery: operator checks, torch.compile, autocast."""

from __future__ import annotations

import pytest
import torch

from tests.ops.rung_cases import make, run
from tlfast.ops import rung


@pytest.mark.parametrize("h_dtype, s_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_opcheck(per_channel, h_dtype, s_dtype):
    h, s, weight, bias, alpha = (x.detach() for x in make((2, 5), 12, 8, h_dtype, s_dtype, per_channel=per_channel))
    torch.library.opcheck(torch.ops.tlfast.rung_fwd, (h, s, weight, bias, alpha, 0.1, "native"))
    torch.library.opcheck(torch.ops.tlfast.rung_fwd, (h, s, weight, None, alpha, 0.1, "native"))
    z = torch.ops.tlfast.rung_fwd(h, s, weight, bias, alpha, 0.1, "native")
    dz = torch.ones_like(z)
    torch.library.opcheck(torch.ops.tlfast.rung_bwd, (dz, h, s, z, alpha, 0.1, True, True, "native"))
    torch.library.opcheck(torch.ops.tlfast.rung_bwd, (dz, None, None, None, alpha, 0.1, True, False, "native"))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_into_one_graph(impl):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def layer(h, s, weight, bias, alpha):
        return torch.tanh(rung(h, s * 2, weight, bias, alpha, impl=impl))

    for rows in (5, 9):
        inputs = make((2, rows), 12, 8)
        trained = inputs[1:]
        grads = torch.autograd.grad(layer(*inputs).sum(), trained)
        h, s, weight, bias, alpha = inputs
        eager = torch.tanh(rung(h, s * 2, weight, bias, alpha, impl="native"))
        for ours, expected in zip(grads, torch.autograd.grad(eager.sum(), trained), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_autocast_casts_the_tap(impl):
    h, s, weight, bias, alpha = make((3, 7), 12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run((h, s, weight, bias, alpha), impl)
    expected = run((h.bfloat16(), s, weight, bias, alpha), impl)
    for name in cast:
        assert cast[name].dtype == torch.float32
        torch.testing.assert_close(cast[name], expected[name], rtol=0, atol=0)
    assert not torch.equal(cast["z"], run((h, s, weight, bias, alpha), impl)["z"])


def test_autocast_leaves_float64_alone():
    inputs = tuple(x.detach().double() for x in make((3,), 12, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rung(*inputs, impl="reference"), rung(*inputs))


def test_autocast_compiles():
    torch.compiler.reset()
    inputs = make((3, 7), 12, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = torch.compile(rung, fullgraph=True)(*inputs)
        torch.testing.assert_close(ours, rung(*inputs))


def test_gradient_of_low_precision_parameters():
    inputs = make((3, 7), 12, 8)
    half = tuple(x.detach().bfloat16().requires_grad_(x.requires_grad) for x in inputs)
    for name, grad in run(half, "native").items():
        assert grad.dtype == torch.bfloat16, name
        torch.testing.assert_close(grad.float(), run(inputs, "reference")[name], rtol=0.05, atol=0.05)
