"""Stateless dropout: the mask's statistics, its bits against the native kernels', its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlfast import _native
from tlfast.ops import attention, dropout
from tlfast.ops.dropout import keep_mask

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
MASK_64 = 2**64 - 1


def formula(p: float, seed: int, row: int, column: int) -> bool:
    """The definition in csrc/common/dropout.h, in Python's exact integers."""
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK_64
    key = (z ^ (z >> 31)) & 0xFFFFFFFF
    x = (column * 0x9E3779B9 + key) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) >= int(p * 2**32)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    row=st.integers(0, 2**40),
    column=st.integers(0, 2**20),
    p=st.floats(0.0, 0.999),
)
def test_mask_is_its_definition(seed, row, column, p):
    mask = keep_mask(p, torch.tensor(seed), torch.tensor([row]), column + 1)
    assert bool(mask[0, column]) == formula(p, seed, row, column)


@needs_native
@pytest.mark.parametrize("seed", [0, 1, -1, 2**62, -(2**63)])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.99])
def test_native_kernels_have_the_same_mask_to_the_bit(p, seed):
    rows, width = 77, 101
    expected = keep_mask(p, torch.tensor(seed), torch.arange(rows), width)
    ones, zeros = torch.ones(rows, width), torch.zeros(rows, width)
    u, _, _, _ = torch.ops.tlfast.add_norm_fwd(ones, zeros, ones[0], None, 1e-5, "layer", p, torch.tensor(seed))
    assert torch.equal(u != 0, expected)

    # scores 0 and values the identity: what comes out is the dropped map itself
    batch, heads, queries, keys = 2, 3, 21, 40
    q, k = torch.zeros(batch, queries, heads, keys), torch.zeros(batch, keys, heads, keys)
    v = torch.eye(keys)[:, None].expand(batch, keys, heads, keys)
    out = attention(q, k, v, dropout_p=p, seed=seed, impl="native")
    expected = keep_mask(p, torch.tensor(seed), torch.arange(batch * heads * queries), keys)
    assert torch.equal(out.transpose(1, 2) != 0, expected.view(batch, heads, queries, keys))


def standard_scores(observed: torch.Tensor, probability: float, trials: int) -> torch.Tensor:
    return (observed - trials * probability) / math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_of_the_whole_of_rows_and_of_columns(p):
    size = 1024
    kept = keep_mask(p, torch.tensor(1234), torch.arange(size), size).double()
    assert standard_scores(kept.sum(), 1 - p, size * size).abs() < 4
    for scores in (standard_scores(kept.sum(0), 1 - p, size), standard_scores(kept.sum(1), 1 - p, size)):
        assert scores.abs().max() < 5
        assert 0.85 < scores.var() < 1.15  # as independent draws, neither clumped nor evened out


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 8), (0, 64), (8, 0), (64, 0), (3, 5)])
def test_neighbours_are_independent(shift):
    size, p = 1024, 0.3
    kept = keep_mask(p, torch.tensor(-99), torch.arange(size), size)
    rows, columns = (size - s for s in shift)
    both = (kept[:rows, :columns] & kept[shift[0] :, shift[1] :]).sum()
    assert standard_scores(both.double(), (1 - p) ** 2, rows * columns).abs() < 4.5


@pytest.mark.parametrize("other", [1, 2, 1 << 20, 1 << 32, 1 << 40, 0x9E3779B97F4A7C15 - 2**64])
def test_seeds_are_independent(other):
    """The last seed is one row's step: its mask is the first's moved by a row, so compare the same rows."""
    size, p = 1024, 0.3
    first, second = (keep_mask(p, torch.tensor(s), torch.arange(size), size) for s in (0, other))
    agree = (first == second).sum()
    assert standard_scores(agree.double(), p**2 + (1 - p) ** 2, size * size).abs() < 4.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values(dtype):
    x = torch.randn(4, 7, 30, dtype=dtype)
    y = dropout(x, 0.4, 3)
    keep = keep_mask(0.4, torch.tensor(3), torch.arange(28), 30).view(4, 7, 30)
    assert y.dtype == dtype
    assert torch.equal(y, torch.where(keep, x * (1 / 0.6), 0))
    assert torch.equal(y, dropout(x, 0.4, torch.tensor(3)))
    assert dropout(x, 0.0, 3) is x


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
def test_shapes_at_the_edge(shape):
    assert dropout(torch.ones(shape), 0.5, 1).shape == shape


def test_gradients_of_both_orders():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, 5), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.3, 5) ** 2, x)


def test_nothing_but_the_seed_is_kept():
    x = torch.randn(64, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.3, 5)
    assert sum(t.numel() for t in saved) == 1


def test_compiles_in_one_graph():
    def step(x):
        return dropout(x, 0.3, torch.randint(2**62, ()))

    x = torch.randn(6, 8, requires_grad=True)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        out = function(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("p", "seed", "message"),
    [
        (1.0, 1, r"dropout_p must be in \[0, 1\)"),
        (-0.1, 1, "not -0.1"),
        (float("nan"), 1, "not nan"),
        (0.1, None, "not NoneType: draw one"),
        (0.1, True, "not bool"),
        (0.1, 2**63, "64 signed bits"),
        (0.1, torch.tensor([1]), r"0-dim int64 tensor, not torch.int64 of shape \(1,\)"),
        (0.1, torch.tensor(1, dtype=torch.int32), "not torch.int32"),
    ],
)
def test_bad_arguments(p, seed, message):
    with pytest.raises(ValueError, match=message):
        dropout(torch.ones(2), p, seed)
