"""What a rung's weights get without its side state is what autograd gives them."""

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.rung_cases import make
from tlfast.ops import rung, rung_gradients

SHAPES = [((1,), 16, 16), ((2, 63), 100, 48), ((65,), 768, 96), ((0, 4), 8, 4), ((3, 5, 7), 33, 12)]


def autograd(h, s, weight, bias, alpha, dz, impl):
    trained = [x.detach().clone().requires_grad_() for x in (weight, alpha, *([] if bias is None else [bias]))]
    z = rung(h, s, trained[0], None if bias is None else trained[2], trained[1], impl=impl)
    return z, torch.autograd.grad(z, trained, dz)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape, depth, width", SHAPES)
def test_gradients_equal_autograds(shape, depth, width, per_channel, bias):
    h, s, weight, bias, alpha = make(shape, depth, width, per_channel=per_channel, bias=bias)
    s, weight, alpha = s.detach(), weight.detach(), alpha.detach()
    bias = None if bias is None else bias.detach()
    dz = torch.randn_like(s)
    exact_inputs = [None if x is None else x.double() for x in (h, s, weight, bias, alpha, dz)]
    _, exact = autograd(*exact_inputs, "reference")
    z, plain = autograd(h, s, weight, bias, alpha, dz, "reference")
    sums = (dz * z.detach()).flatten(0, -2).sum(0)
    dweight, dbias, dalpha = rung_gradients(h, dz, sums, weight, bias, alpha)
    # z and p are summed apart here, and nearly cancel where the gate is nearly closed
    magnitude = (exact_inputs[5] * z.detach().double()).abs().flatten(0, -2).sum(0) / 0.1
    rounding = 4 * torch.finfo(torch.float32).eps * (magnitude if per_channel else magnitude.sum().view(alpha.shape))
    assert_within_budget("dweight", dweight, plain[0], exact[0])
    assert_within_budget("dalpha", dalpha, plain[1], exact[1], rounding)
    if bias is not None:
        assert_within_budget("dbias", dbias, plain[2], exact[2])


@pytest.mark.parametrize("gate", [-3.0, 0.0, 3.0, 60.0])
def test_gradients_of_open_and_closed_gates(gate):
    h, s, weight, bias, alpha = (x.detach().double() for x in make((50,), 24, 8))
    alpha.fill_(gate)
    dz = torch.randn_like(s)
    z, (dweight, dalpha, dbias) = autograd(h, s, weight, bias, alpha, dz, "reference")
    ours = rung_gradients(h, dz, (dz * z).sum(0).detach(), weight, bias, alpha)
    for found, expected in zip(ours, (dweight, dbias, dalpha), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_gate_they_are_those_of_the_projection(dtype):
    h, s, weight, bias, _ = (x.detach() for x in make((7, 3), 24, 8))
    h, dz = h.to(dtype), torch.randn_like(s).to(torch.promote_types(dtype, torch.float32))
    dweight, dbias, dalpha = rung_gradients(h, dz, torch.zeros(8), weight, bias, None)
    assert dalpha is None and dweight.dtype == dbias.dtype == dz.dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    expected = dz.flatten(0, -2).T.double() @ h.flatten(0, -2).double()
    torch.testing.assert_close(dweight.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    torch.testing.assert_close(dbias.double(), dz.flatten(0, -2).double().sum(0), rtol=1e-5, atol=1e-5)
