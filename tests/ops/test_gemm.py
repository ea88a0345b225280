"""The CPU product: both routes agree, the choice is made once, and a missing private operator is no error."""

from __future__ import annotations

import time

import pytest
import torch

from tlfast.ops import _gemm


@pytest.fixture
def forget_choice():
    _gemm.prefers_onednn.cache_clear()
    yield
    _gemm.prefers_onednn.cache_clear()


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 65, 100), (0, 3, 4), (5, 0, 4), (5, 3, 0)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_both_routes(shape, transposed, onednn, monkeypatch):
    monkeypatch.setattr(_gemm, "prefers_onednn", lambda transposed: onednn)
    m, n, k = shape
    x = torch.randn(k, m).t() if transposed else torch.randn(m, k)
    w = torch.randn(k, n).t() if transposed else torch.randn(n, k)
    result = _gemm.linear(x, w.requires_grad_())
    assert result.shape == (m, n)
    assert not result.requires_grad
    torch.testing.assert_close(result.double(), x.double() @ w.detach().double().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio, expected", [(1.2, False), (2.2, True)])
def test_only_a_clear_win_changes_the_route(ratio, expected, monkeypatch, forget_choice):
    asked = []
    monkeypatch.setattr(_gemm, "times_faster", lambda product, than: asked.append(product().shape) or ratio)
    assert [_gemm.prefers_onednn(True), _gemm.prefers_onednn(True)] == [expected, expected]
    assert len(asked) == 1


def test_the_race_leaves_the_threads_as_they_were(two_threads):
    seen = []
    long, short = (lambda: seen.append(torch.get_num_threads()) or time.sleep(0.02)), lambda: None
    assert _gemm.times_faster(short, than=long, rounds=2) > 1 > _gemm.times_faster(long, than=short, rounds=2)
    assert set(seen) == {1} and torch.get_num_threads() == 2


def test_a_missing_or_wrong_operator_is_not_used(monkeypatch, forget_choice):
    def missing(x, w):
        raise AttributeError("no such operator")

    for operator in (missing, lambda x, w: torch.zeros(x.shape[0], w.shape[0])):
        monkeypatch.setattr(_gemm, "_onednn", operator)
        _gemm.prefers_onednn.cache_clear()
        assert not _gemm.prefers_onednn(False)
