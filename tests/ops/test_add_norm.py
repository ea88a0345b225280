"""add_norm: values and gradients against PyTorch in float64, dropout, what is kept, PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tlfast import ops
from tlfast.ops import _dispatch, add_norm

from .norm_cases import EPS, IMPLS, NORMS, SHAPES, Case, check, needs_native, only_y, results

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, norm, dropout_p, impl):
    eps = EPS if shape[-1] > 1 else 1e-2
    check(only_y, Case(shape, norm), "y", impl, eps=eps, dropout_p=dropout_p, seed=7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_far_from_zero(norm, impl):
    """E[u^2] - mean^2 would cancel here."""
    check(only_y, Case((40, 96), norm, offset=1000.0), "y", impl, eps=EPS)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_row_of_an_rms_norm(impl):
    x, residual = torch.zeros(3, 8), torch.zeros(3, 8, requires_grad=True)
    y = add_norm(x, residual, torch.ones(8), eps=0.25, norm="rms", impl=impl)
    y.backward(torch.ones(3, 8))
    assert torch.equal(y, x)
    assert torch.equal(residual.grad, torch.full((3, 8), 2.0))  # 1/sqrt(eps)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_row(impl):
    x, weight = torch.zeros(3, 8), torch.ones(8)
    y = add_norm(x, x + 5, weight, weight * 2, eps=1e-5, impl=impl)
    assert torch.equal(y, torch.full((3, 8), 2.0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_nan_is_not_hidden(norm, impl):
    x = torch.randn(4, 24)
    x[1, 3] = torch.nan
    y = add_norm(x, x.new_zeros(4, 24), torch.ones(24), eps=EPS, norm=norm, impl=impl)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty(shape, norm, impl):
    found = results(only_y, Case(shape, norm), torch.float32, "y", eps=EPS, dropout_p=0.1, seed=1, impl=impl)
    for name, tensor in found.items():
        if name in ("dweight", "dbias"):
            assert torch.equal(tensor, torch.zeros(8))
        else:
            assert tensor.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_views(impl):
    wide, weight = torch.randn(6, 5, 40), torch.randn(20)
    x, residual = wide[..., :20], wide[..., 20:]
    expected = add_norm(x.contiguous(), residual.contiguous(), weight, None, eps=EPS, impl=impl)
    assert torch.equal(add_norm(x, residual, weight, None, eps=EPS, impl=impl), expected)
    assert torch.equal(add_norm(x, residual, weight.repeat_interleave(2)[::2], None, eps=EPS, impl=impl), expected)
    turned = wide.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(add_norm(turned[..., :20], turned[..., 20:], weight, None, eps=EPS, impl=impl), expected)
    leaf = x.clone().requires_grad_()  # sum() hands an expanded gradient down
    add_norm(leaf, residual, weight, None, eps=EPS, impl=impl).sum().backward()
    assert leaf.grad.isfinite().all()


@needs_native
@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 200),
    width=st.integers(2, 150),
    norm=st.sampled_from(NORMS),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_native_agrees_with_the_formula_on_any_input(rows, width, norm, dropout_p, seed):
    # eps as large as a variance: rows of few channels else amplify the rounding of their inputs without bound
    check(only_y, Case((rows, width), norm), "y", "native", eps=1.0, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize(
    ("norm", "impl", "numbers_a_row"),
    [
        ("layer", "reference", 2),  # mean and 1/deviation
        pytest.param("layer", "native", 2, marks=needs_native),
        pytest.param("rms", "native", 1, marks=needs_native),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_kept_for_backward(dropout_p, norm, impl, numbers_a_row):
    rows, width = 50, 96
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((rows, width), (rows, width), (width,)))
    seed, saved = torch.tensor(1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_norm(x, residual, weight, eps=EPS, norm=norm, dropout_p=dropout_p, seed=seed, impl=impl)
    given_storages = {t.untyped_storage().data_ptr() for t in (x, residual, weight, seed)}
    new = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved) if s.data_ptr() not in given_storages}
    assert sum(new.values()) == 4 * (rows * width + numbers_a_row * rows)  # the sum too; no mask


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(norm, dropout_p):
    case = Case((3, 6), norm)

    def function(*leaves):
        return add_norm(*leaves, eps=1e-5, norm=case.norm, dropout_p=dropout_p, seed=2)

    assert torch.autograd.gradcheck(function, case.leaves(torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_compiles_in_one_graph_with_the_seed_drawn_inside(norm, impl):
    def step(*leaves):
        seed = torch.randint(2**62, ())
        return add_norm(*leaves, eps=EPS, norm=norm, dropout_p=0.2, seed=seed, impl=impl)

    leaves = Case((4, 9, 24), norm).leaves(torch.float32)
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        y = function(*leaves)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpoint_repeats_the_mask(impl):
    x, residual, weight = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8), torch.ones(8)
    seed = torch.randint(2**62, ())

    def function(x):
        return add_norm(x, residual, weight, None, eps=EPS, dropout_p=0.3, seed=seed, impl=impl).square()

    (plain,) = torch.autograd.grad(function(x)[:, 0].sum(), x)
    recomputed = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(plain, torch.autograd.grad(recomputed[:, 0].sum(), x)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_half_precision_x_on_a_float32_residual(norm, impl):
    """What autocast brings: a linear's output in bfloat16, the residual stream in float32."""
    x, residual, weight = torch.randn(5, 16).bfloat16(), torch.randn(5, 16), torch.randn(16)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = add_norm(x, residual, weight, eps=EPS, norm=norm, impl=impl)
    assert torch.equal(y, add_norm(x.float(), residual, weight, eps=EPS, norm=norm, impl=impl))
    assert y.dtype == torch.float32
    assert torch.autograd.grad(y.square().sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("norm", "peer"), [("layer", F.layer_norm), ("rms", F.rms_norm)])
def test_other_dtypes_run_on_the_reference(norm, peer):
    x, residual, weight = torch.randn(5, 16).bfloat16(), torch.randn(5, 16).bfloat16(), torch.randn(16)
    y = add_norm(x, residual, weight, eps=EPS, norm=norm)
    assert torch.equal(y, peer(x + residual, (16,), weight=weight.bfloat16(), eps=EPS))


@needs_native
def test_native_refuses_other_dtypes():
    x = torch.randn(5, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"float32 residual, not torch\.float64"):
        add_norm(x, x, torch.ones(16), None, eps=EPS, impl="native")


def test_named_implementation_runs_or_raises(monkeypatch):
    x = torch.randn(5, 16)
    monkeypatch.setitem(_dispatch.MISSING, "native", "blocked by a test")
    with pytest.raises(RuntimeError, match="blocked by a test"):
        add_norm(x, x, torch.ones(16), None, eps=EPS, impl="native")
    with pytest.raises(ValueError, match="'triton' is not one of add_norm's"):
        add_norm(x, x, torch.ones(16), None, eps=EPS, impl="triton")
    assert set(ops.implementations("add_norm")) == {"reference", "native"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x must be \(\.\.\., R\)"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x must be a floating-point tensor, not torch.int64"),
        ({"residual": torch.ones(8)}, r"residual must be \(2, 8\) as x is, not \(8,\)"),
        ({"weight": torch.ones(7)}, r"weight must be \(8,\)"),
        ({"bias": torch.ones(1)}, r"bias must be \(8,\)"),
        ({"bias": 1.0}, "bias must be a floating-point tensor, not float"),
        ({"weight": torch.ones(8, device="meta")}, "weight is on meta"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"norm": "batch"}, r"norm must be one of \('layer', 'rms'\), not 'batch'"),
        ({"norm": "rms", "bias": torch.ones(8)}, "bias must be None with norm='rms'"),
        ({"dropout_p": 0.1}, "seed must be"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_bad_arguments(change, message):
    arguments = {
        "x": torch.ones(2, 8),
        "residual": torch.ones(2, 8),
        "weight": torch.ones(8),
        "bias": None,
        "eps": 1e-5,
    }
    with pytest.raises(ValueError, match=message):
        add_norm(**(arguments | change))
