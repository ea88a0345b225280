"""add_norm: values and gradients against PyTorch in float64, dropout, what is kept, PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tlfast import _native, ops
from tlfast.ops import _dispatch, add_norm, dropout

from ..budget import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")
needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
IMPLS = ["reference", pytest.param("native", marks=needs_native)]
SHAPES = [(1, 1), (2, 63, 96), (65, 100), (3, 5, 7, 48), (7,), (300, 33), (5, 4096)]
EPS = 1e-12  # BERT's


def make(shape, bias=True, offset=0.0):
    """x, residual, weight, bias and the output's gradient: float32 numbers as float64."""
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(shape) for _ in range(3))
    weight, shift = torch.randn(shape[-1]), torch.randn(shape[-1])
    return [None if t is None else t.double() for t in (x, residual + offset, weight, shift if bias else None, dy)]


def pytorch(x, residual, weight, bias, *, eps, dropout_p=0.0, seed=None):
    return F.layer_norm(residual + dropout(x, dropout_p, seed), weight.shape, weight, bias, eps)


def run(function, case, dtype, **options):
    """Output and the gradients of x, residual, weight and bias (where there is one)."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in case[:4]]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], case[4].to(dtype))]


def check(case, **options):
    """The shared budget, plus one rounding of the case's largest number: a result can be exact in PyTorch by luck."""
    impl = options.pop("impl")
    exact = run(pytorch, case, torch.float64, **options)
    peer = run(pytorch, case, torch.float32, **options)
    ours = run(add_norm, case, torch.float32, impl=impl, **options)
    rounding = torch.finfo(torch.float32).eps * max(float(t.abs().max()) for t in (*case, *exact) if t is not None)
    for name, a, b, e in zip(("y", "dx", "dresidual", "dweight", "dbias"), ours, peer, exact, strict=False):
        assert_within_budget(name, a, b, e, rounding)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, bias, dropout_p, impl):
    check(make(shape, bias), eps=EPS if shape[-1] > 1 else 1e-2, dropout_p=dropout_p, seed=7, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_far_from_zero(impl):
    """E[u^2] - mean^2 would cancel here."""
    check(make((40, 96), offset=1000.0), eps=EPS, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_row(impl):
    x, weight = torch.zeros(3, 8), torch.ones(8)
    y = add_norm(x, x + 5, weight, weight * 2, eps=1e-5, impl=impl)
    assert torch.equal(y, torch.full((3, 8), 2.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_hidden(impl):
    x = torch.randn(4, 24)
    x[1, 3] = torch.nan
    y = add_norm(x, x.new_zeros(4, 24), torch.ones(24), None, eps=EPS, impl=impl)
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty(shape, impl):
    y, dx, dresidual, dweight, dbias = run(
        add_norm, make(shape), torch.float32, eps=EPS, dropout_p=0.1, seed=1, impl=impl
    )
    assert y.shape == dx.shape == dresidual.shape == shape
    assert dweight.abs().sum() == dbias.abs().sum() == 0


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
    bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_native_agrees_with_the_formula_on_any_input(rows, width, bias, dropout_p, seed):
    # eps as large as a variance: rows of few channels else amplify the rounding of their inputs without bound
    check(make((rows, width), bias), eps=1.0, dropout_p=dropout_p, seed=seed, impl="native")


@needs_native
@pytest.mark.parametrize("shape", [(2048, 96), (130, 17), (5000, 8)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    case, before = make(shape), torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(add_norm, case, torch.float32, eps=EPS, dropout_p=0.1, seed=3, impl="native"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_kept_for_backward(dropout_p, impl):
    rows, width = 50, 96
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((rows, width), (rows, width), (width,)))
    seed, saved = torch.tensor(1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_norm(x, residual, weight, None, eps=EPS, dropout_p=dropout_p, seed=seed, impl=impl)
    given_storages = {t.untyped_storage().data_ptr() for t in (x, residual, weight, seed)}
    new = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved) if s.data_ptr() not in given_storages}
    assert sum(new.values()) == 4 * (rows * width + 2 * rows)  # the sum, mean and 1/deviation; no mask


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(bias, dropout_p):
    leaves = [t.requires_grad_() for t in make((3, 6), bias)[:4] if t is not None]

    def function(x, residual, weight, bias=None):
        return add_norm(x, residual, weight, bias, eps=1e-5, dropout_p=dropout_p, seed=2)

    assert torch.autograd.gradcheck(function, leaves)


@needs_native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_opcheck(bias, dropout_p):
    x, residual, weight, shift, dy = (None if t is None else t.float() for t in make((2, 5, 12), bias))
    seed = torch.tensor(9) if dropout_p else None
    forward = (x, residual, weight, shift, 1e-5, dropout_p, seed)
    torch.library.opcheck(torch.ops.tlfast.add_norm_fwd.default, forward)
    _, u, mean, rstd = torch.ops.tlfast.add_norm_fwd(*forward)
    torch.library.opcheck(torch.ops.tlfast.add_norm_bwd.default, (dy, u, mean, rstd, weight, dropout_p, seed, bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_in_one_graph_with_the_seed_drawn_inside(impl):
    def step(x, residual, weight, bias):
        seed = torch.randint(2**62, ())
        return add_norm(x, residual, weight, bias, eps=EPS, dropout_p=0.2, seed=seed, impl=impl)

    leaves = [t.float().requires_grad_() for t in make((4, 9, 24))[:4]]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
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
def test_half_precision_x_on_a_float32_residual(impl):
    """What autocast brings: a linear's output in bfloat16, the residual stream in float32."""
    x, residual, weight = torch.randn(5, 16).bfloat16(), torch.randn(5, 16), torch.randn(16)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = add_norm(x, residual, weight, None, eps=EPS, impl=impl)
    assert torch.equal(y, add_norm(x.float(), residual, weight, None, eps=EPS, impl=impl))
    assert y.dtype == torch.float32
    assert torch.autograd.grad(y.square().sum(), x)[0].dtype == torch.bfloat16


def test_other_dtypes_run_on_the_reference():
    x, residual, weight = torch.randn(5, 16).bfloat16(), torch.randn(5, 16).bfloat16(), torch.randn(16)
    y = add_norm(x, residual, weight, None, eps=EPS)
    assert torch.equal(y, F.layer_norm(x + residual, (16,), weight.bfloat16(), None, EPS))


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
