"""prenorm: sum and norm with gradients through either or both, PyTorch's machinery; its kernels are add_norm's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from tlfast import ops
from tlfast.ops import _dispatch, add_norm, prenorm

from .norm_cases import EPS, IMPLS, NORMS, SHAPES, Case, check, needs_native, results

pytestmark = pytest.mark.usefixtures("poisoned")
USED = ["uy", "u", "y"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, norm, dropout_p, used, impl):
    eps = EPS if shape[-1] > 1 else 1e-2
    check(prenorm, Case(shape, norm), used, impl, eps=eps, dropout_p=dropout_p, seed=7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
def test_norm_is_that_of_add_norm(norm, impl):
    case = Case((70, 33), norm)
    options = {"eps": EPS, "norm": case.norm, "dropout_p": 0.2, "seed": 5, "impl": impl}
    leaves = case.leaves(torch.float32)
    assert torch.equal(prenorm(*leaves, **options)[1], add_norm(*leaves, **options))


@needs_native
@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 200),
    width=st.integers(2, 150),
    norm=st.sampled_from(NORMS),
    used=st.sampled_from(USED),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_native_agrees_with_the_formula_on_any_input(rows, width, norm, used, dropout_p, seed):
    # eps as large as a variance: rows of few channels else amplify the rounding of their inputs without bound
    check(prenorm, Case((rows, width), norm), used, "native", eps=1.0, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_empty(shape, norm, impl):
    found = results(prenorm, Case(shape, norm), torch.float32, "uy", eps=EPS, dropout_p=0.1, seed=1, impl=impl)
    for name, tensor in found.items():
        if name in ("dweight", "dbias"):
            assert torch.equal(tensor, torch.zeros(8))
        else:
            assert tensor.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_views_and_gradients_that_are_views(dropout_p, impl):
    wide, weight = torch.randn(6, 5, 80), torch.randn(20)
    dense = [part.contiguous() for part in wide.split(20, -1)]
    turned = wide.permute(2, 1, 0).contiguous().permute(2, 1, 0).split(20, -1)
    found = []
    for parts in (dense, wide.split(20, -1), turned):
        leaves = [t.detach().requires_grad_() for t in parts[:2]]
        outputs = prenorm(*leaves, weight, eps=EPS, dropout_p=dropout_p, seed=1, impl=impl)
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, parts[2:])))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", USED)
def test_expanded_gradients(used, impl):
    """sum() hands one number down, expanded."""
    found = []
    for reduce in (torch.Tensor.sum, lambda t: (t * torch.ones_like(t)).sum()):
        leaves = Case((9, 12)).leaves(torch.float32)
        outputs = dict(zip("uy", prenorm(*leaves, eps=EPS, dropout_p=0.3, seed=1, impl=impl), strict=True))
        found.append(torch.autograd.grad(sum(reduce(outputs[name]) for name in used), leaves[:2]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(2048, 96), (130, 17), (5000, 8)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape, norm):
    case, before, found = Case(shape, norm), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(results(prenorm, case, torch.float32, "uy", eps=EPS, dropout_p=0.1, seed=3, impl="native"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@needs_native
@pytest.mark.parametrize("norm, numbers_a_row", [("layer", 2), ("rms", 1)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_kept_for_backward(dropout_p, norm, numbers_a_row):
    rows, width = 50, 96
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((rows, width), (rows, width), (width,)))
    seed, saved = torch.tensor(1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        u, _ = prenorm(x, residual, weight, eps=EPS, norm=norm, dropout_p=dropout_p, seed=seed, impl="native")
    held = {t.untyped_storage().data_ptr() for t in (x, residual, weight, seed, u)}
    new = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved) if s.data_ptr() not in held}
    assert u.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in saved}
    assert sum(new.values()) == 4 * numbers_a_row * rows  # nothing of the width; no mask


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(norm, dropout_p):
    case = Case((3, 6), norm)

    def function(*leaves):
        return prenorm(*leaves, eps=1e-5, norm=case.norm, dropout_p=dropout_p, seed=2)

    assert torch.autograd.gradcheck(function, case.leaves(torch.float64))


@needs_native
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_opcheck(norm, dropout_p):
    case = Case((2, 5, 12), norm)
    x, residual, weight, *bias = (t.float() for t in case.inputs)
    seed = torch.tensor(9) if dropout_p else None
    forward = (x, residual, weight, bias[0] if bias else None, 1e-5, case.norm, dropout_p, seed)
    torch.library.opcheck(torch.ops.tlfast.add_norm_fwd.default, forward)
    u, _, mean, rstd = torch.ops.tlfast.add_norm_fwd(*forward)
    kept = (u, None if case.norm == "rms" else mean, rstd, weight)
    for du in (None, case.gradients["u"].float()):
        backward = (du, case.gradients["y"].float(), *kept, dropout_p, seed, bool(bias))
        torch.library.opcheck(torch.ops.tlfast.add_norm_bwd.default, backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_compiles_in_one_graph_with_the_seed_drawn_inside(dropout_p, norm, used, impl):
    def step(*leaves):
        seed = torch.randint(2**62, ())
        u, y = prenorm(*leaves, eps=EPS, norm=norm, dropout_p=dropout_p, seed=seed, impl=impl)
        return {"u": u, "y": y}

    leaves = Case((4, 9, 24), norm).leaves(torch.float32)
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        outputs = function(*leaves)
        loss = sum(outputs[name].square().sum() for name in used)
        reached = leaves if "y" in used else leaves[:2]
        found.append((*outputs.values(), *torch.autograd.grad(loss, reached)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpoint_repeats_the_mask(impl):
    x, residual, weight = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8), torch.ones(8)
    seed = torch.randint(2**62, ())

    def function(x):
        u, y = prenorm(x, residual, weight, eps=EPS, norm="rms", dropout_p=0.3, seed=seed, impl=impl)
        return u * y

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
        outputs = prenorm(x, residual, weight, eps=EPS, norm=norm, impl=impl)
    expected = prenorm(x.float(), residual, weight, eps=EPS, norm=norm, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert outputs[0].dtype == outputs[1].dtype == torch.float32
    assert torch.autograd.grad(outputs, x, [torch.ones(5, 16)] * 2)[0].dtype == torch.bfloat16


def test_changing_the_sum_in_place_is_noticed():
    """The backward pass reads u, which is the caller's too."""
    x = torch.randn(5, 16, requires_grad=True)
    u, y = prenorm(x, torch.randn(5, 16), torch.ones(16), eps=EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        u.add_(1)
        y.sum().backward()


def test_named_implementation_runs_or_raises(monkeypatch):
    x = torch.randn(5, 16)
    monkeypatch.setitem(_dispatch.MISSING, "native", "blocked by a test")
    with pytest.raises(RuntimeError, match="prenorm: impl='native' cannot run: blocked by a test"):
        prenorm(x, x, torch.ones(16), eps=EPS, impl="native")
    with pytest.raises(ValueError, match="'triton' is not one of prenorm's"):
        prenorm(x, x, torch.ones(16), eps=EPS, impl="triton")
    assert set(ops.implementations("prenorm")) == {"reference", "native"}


def test_bad_arguments():
    x = torch.randn(5, 16)
    with pytest.raises(ValueError, match=r"residual must be \(5, 16\) as x is, not \(16,\)"):
        prenorm(x, x[0], torch.ones(16), eps=EPS)
    with pytest.raises(ValueError, match="bias must be None with norm='rms'"):
        prenorm(x, x, torch.ones(16), torch.ones(16), eps=EPS, norm="rms")
    with pytest.raises(ValueError, match="seed must be"):
        prenorm(x, x, torch.ones(16), eps=EPS, dropout_p=0.1)
