"""The CPU product: both routes agree, the choice is made once, and neither rounds more than PyTorch's own."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from tests.budget import assert_within_budget
from tlfast import _native
from tlfast.ops import _gemm
from tlfast.ops._shared_weight import why_not_native

WHY_NOT = "the native library is not loaded" if _native.why_not() else why_not_native()
ROUTES = [False, pytest.param(True, marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)))]


@pytest.fixture
def forget_choice():
    _gemm.prefers_native.cache_clear()
    yield
    _gemm.prefers_native.cache_clear()


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 65, 100), (0, 3, 4), (5, 0, 4), (5, 3, 0), (17, 96, 300)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("native", ROUTES)
def test_both_routes(shape, transposed, native, monkeypatch):
    monkeypatch.setattr(_gemm, "prefers_native", lambda: native)
    monkeypatch.setattr(_gemm, "_FEWEST_ROWS", 1)
    m, n, k = shape
    x = torch.randn(k, m).t() if transposed else torch.randn(m, k)
    w = torch.randn(k, n).t() if transposed else torch.randn(n, k)
    result = _gemm.linear(x, w.requires_grad_())
    assert result.shape == (m, n)
    assert not result.requires_grad
    exact = x.double() @ w.detach().double().t()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("native", ROUTES)
def test_long_sums_round_no_more_than_pytorch(transposed, native, monkeypatch):
    monkeypatch.setattr(_gemm, "prefers_native", lambda: native)
    generator = torch.Generator().manual_seed(0)

    def normal(rows, columns):
        # a view into wider rows: the numbers of a row lie side by side, rows do not
        return torch.randn(rows, columns + 9, generator=generator)[:, 3 : columns + 3]

    x, w = (normal(3000, 64).t(), normal(3000, 80).t()) if transposed else (normal(70, 3000), normal(80, 3000))
    assert_within_budget("x w^T", _gemm.linear(x, w), F.linear(x, w), F.linear(x.double(), w.double()))


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("ratio, expected", [(1.2, False), (2.2, True)])
def test_only_a_clear_win_changes_the_route(ratio, expected, monkeypatch, forget_choice):
    asked = []
    monkeypatch.setattr(_native, "matrix_isa", lambda: "AVX-512 VNNI")
    monkeypatch.setattr(_gemm, "times_faster", lambda product, than: asked.append(product().shape) or ratio)
    assert [_gemm.prefers_native(), _gemm.prefers_native()] == [expected, expected]
    assert len(asked) == 1


@pytest.mark.parametrize("isa", ["AMX", "AVX2"])
def test_no_race_where_it_has_no_such_product(isa, monkeypatch, forget_choice):
    monkeypatch.setattr(_native, "matrix_isa", lambda: isa)
    monkeypatch.setattr(_gemm, "times_faster", lambda product, than: pytest.fail("there is nothing to race"))
    assert not _gemm.prefers_native()


def test_the_race_leaves_the_threads_as_they_were(two_threads):
    seen = []
    long, short = (lambda: seen.append(torch.get_num_threads()) or time.sleep(0.02)), lambda: None
    assert _gemm.times_faster(short, than=long, rounds=2) > 1 > _gemm.times_faster(long, than=short, rounds=2)
    assert set(seen) == {1} and torch.get_num_threads() == 2
