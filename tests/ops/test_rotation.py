"""Rotary positions: Triton's pass in both directions against the formula."""

from __future__ import annotations

import pytest
import torch

from tests.budget import assert_within_budget
from tests.ops.interpreter import interpreted
from tlfast.ops import rotation
from tlfast.ops.rotation import rotated

DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def make(batches, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    packed = torch.randn(2, 5, 7, 12, dtype=dtype, device=device).requires_grad_()
    angles = torch.randn(batches, 5, 1, 6, device=device).repeat(1, 1, 1, 2)
    return packed, (angles.cos(), angles.sin())


def both_ways(function, packed, tables):
    """Of some heads, as they lie in a projection."""
    y = function(packed[..., 1:5, :], *tables)
    dy = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, packed, dy)[0]


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_one_pass_each_way(device, batches):
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16, torch.float16):
        packed, tables = make(batches, dtype, device)
        ours = both_ways(rotation._Rotation.apply, packed, tables)
        plain = both_ways(formula, packed, tables)
        exact = both_ways(formula, packed.detach().double().requires_grad_(), [table.double() for table in tables])
        for name, *results in zip(("y", "dx"), ours, plain, exact, strict=True):
            assert_within_budget(name, *results)


def formula(x, cosines, sines):
    first, second = x.chunk(2, dim=-1)
    return (x * cosines + torch.cat((-second, first), dim=-1) * sines).to(x.dtype)


def test_elsewhere_it_is_the_formula():
    packed, tables = make(2)
    for ours, plain in zip(both_ways(rotated, packed, tables), both_ways(formula, packed, tables), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.gpu
def test_on_a_gpu_it_is_one_pass():
    packed, tables = make(1, torch.bfloat16, "cuda")
    assert type(rotated(packed, *tables).grad_fn).__name__ == "_RotationBackward"
