"""dropout_add: values and gradients against the formula, the mask, what is kept, PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tlfast import ops
from tlfast.ops import _dispatch, dropout, dropout_add
from tlfast.ops.dropout import keep_mask

from ..budget import assert_within_budget
from .norm_cases import IMPLS, SHAPES, needs_native

pytestmark = pytest.mark.usefixtures("poisoned")


def results(function, shape, dtype, p, seed, **options):
    """z and the gradients of x and residual, for float32 numbers."""
    torch.manual_seed(0)
    x, residual, dz = (torch.randn(shape) for _ in range(3))
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, residual)]
    z = function(*leaves, p, seed, **options)
    return [z.detach(), *torch.autograd.grad(z, leaves, dz.to(dtype))]


def formula(x, residual, p, seed):
    keep = keep_mask(p, torch.tensor(seed), torch.arange(x.shape[:-1].numel()), x.shape[-1]).view(x.shape)
    return residual + torch.where(keep, x / (1 - p), 0)


def check(shape, p, seed, impl):
    exact, peer = (results(formula, shape, dtype, p, seed) for dtype in (torch.float64, torch.float32))
    ours = results(dropout_add, shape, torch.float32, p, seed, impl=impl)
    for name, a, b, e in zip(("z", "dx", "dresidual"), ours, peer, exact, strict=True):
        assert_within_budget(name, a, b, e)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_values_and_gradients(shape, p, impl):
    check(shape, p, 7, impl)


@needs_native
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 150),
    p=st.floats(0.0, 0.99),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_native_agrees_with_the_formula_on_any_input(rows, width, p, seed):
    check((rows, width), p, seed, "native")


@pytest.mark.parametrize("impl", IMPLS)
def test_mask_is_that_of_dropout(impl):
    ones, seed = torch.ones(3, 40, 50), torch.tensor(11)
    assert torch.equal(dropout_add(ones, ones * 0, 0.3, seed, impl=impl), dropout(ones, 0.3, seed))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_dropout_it_is_a_plain_sum(impl):
    x, residual = torch.randn(5, 16), torch.randn(5, 16)
    assert torch.equal(dropout_add(x, residual, 0.0, None, impl=impl), residual + x)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_hidden(impl):
    x = torch.full((20, 20), torch.nan)
    z = dropout_add(x, torch.ones(20, 20), 0.5, 3, impl=impl)
    kept = keep_mask(0.5, torch.tensor(3), torch.arange(20), 20)
    assert z[kept].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_views(impl):
    wide = torch.randn(6, 5, 60)
    turned = wide.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    dense = [part.contiguous() for part in wide.split(20, -1)]
    found = []
    for x, residual, dz in (dense, wide.split(20, -1), turned.split(20, -1)):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        z = dropout_add(*leaves, 0.3, 1, impl=impl)
        found.append((z, *torch.autograd.grad(z, leaves, dz)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_gradient(impl):
    """sum() hands one number down, expanded."""
    x, residual = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    (dx,) = torch.autograd.grad(dropout_add(x, residual, 0.3, 1, impl=impl).sum(), x)
    assert torch.equal(dx, dropout(torch.ones(2, 5, 8), 0.3, 1))


@needs_native
@pytest.mark.parametrize("shape", [(2048, 96), (131, 17), (3, 20000)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(dropout_add, shape, torch.float32, 0.1, 3, impl="native"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_but_the_seed_is_kept(impl):
    x, residual, saved = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout_add(x, residual, 0.3, 5, impl=impl)
    assert sum(t.numel() for t in saved) == 1


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    leaves = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x, residual: dropout_add(x, residual, p, 2), leaves)


@needs_native
def test_opcheck():
    x, residual, dz = (torch.randn(2, 5, 12) for _ in range(3))
    torch.library.opcheck(torch.ops.tlfast.dropout_add_fwd.default, (x, residual, 0.4, torch.tensor(9)))
    torch.library.opcheck(torch.ops.tlfast.dropout_add_bwd.default, (dz, 0.4, torch.tensor(9)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiles_in_one_graph_with_the_seed_drawn_inside(p, impl):
    def step(x, residual):
        return dropout_add(x, residual, p, torch.randint(2**62, ()), impl=impl)

    leaves = [torch.randn(4, 9, 24, requires_grad=True) for _ in range(2)]
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        z = function(*leaves)
        found.append((z, *torch.autograd.grad(z.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpoint_repeats_the_mask(impl):
    x, residual, seed = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8), torch.randint(2**62, ())

    def function(x):
        return dropout_add(x, residual, 0.3, seed, impl=impl).square()

    (plain,) = torch.autograd.grad(function(x).sum(), x)
    recomputed = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(plain, torch.autograd.grad(recomputed.sum(), x)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_half_precision_x_on_a_float32_residual(p, impl):
    """What autocast brings: a linear's output in bfloat16, the residual stream in float32."""
    x, residual = torch.randn(5, 16).bfloat16(), torch.randn(5, 16)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = dropout_add(x, residual, p, 3, impl=impl)
    assert torch.equal(z, dropout_add(x.float(), residual, p, 3, impl=impl))
    assert z.dtype == torch.float32
    assert torch.autograd.grad(z.sum(), x)[0].dtype == torch.bfloat16


def test_other_dtypes_run_on_the_reference():
    x, residual = torch.randn(5, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    assert torch.equal(dropout_add(x, residual, 0.3, 4), residual + dropout(x, 0.3, 4))


@needs_native
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_native_refuses_other_dtypes(p):
    x = torch.randn(5, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"float32 residual, not torch\.float64"):
        dropout_add(x, x, p, 1, impl="native")


def test_named_implementation_runs_or_raises(monkeypatch):
    x = torch.randn(5, 16)
    monkeypatch.setitem(_dispatch.MISSING, "native", "blocked by a test")
    with pytest.raises(RuntimeError, match="blocked by a test"):
        dropout_add(x, x, 0.1, 1, impl="native")
    with pytest.raises(ValueError, match="'triton' is not one of dropout_add's"):
        dropout_add(x, x, 0.1, 1, impl="triton")
    assert set(ops.implementations("dropout_add")) == {"reference", "native"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0), "residual": torch.tensor(1.0)}, r"x must be \(\.\.\., C\), not \(\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x must be a floating-point tensor, not torch.int64"),
        ({"residual": 1.0}, "residual must be a floating-point tensor, not float"),
        ({"residual": torch.ones(8)}, r"residual must be \(2, 8\) as x is, not \(8,\)"),
        ({"residual": torch.ones(2, 8, device="meta")}, "residual is on meta"),
        ({"p": 1.0}, r"must be in \[0, 1\), not 1.0"),
        ({"seed": None}, "seed must be"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "p": 0.1, "seed": 1}
    with pytest.raises(ValueError, match=message):
        dropout_add(**(arguments | change))
