"""attention: values and gradients against PyTorch in float64, masks, dropout, what is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlfast.ops import attention
from tlfast.ops.attention import recompute

from ..budget import assert_within_budget
from .attention_cases import IMPLS, LEAN, TRITON, kept, make, needs_native, pairs, pytorch, rounded, run
from .interpreter import interpreted

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [
    (2, 63, 65, 3, 8),
    (1, 1, 1, 1, 1),
    (3, 100, 37, 2, 12),
    (2, 16, 16, 4, 64),
    (1, 65, 130, 2, 5),
    (2, 33, 48, 2, 4),
]
VARIANTS = {
    "plain": {},
    "bias": {"bias": ("1", "H", "Sq", "Sk")},
    "batch-bias": {"bias": ("B", "H", "Sq", "Sk")},
    "key-bias": {"bias": ("B", "1", "1", "Sk")},
    "mask": {"mask": True},
    "causal": {"causal": True},
    "causal-mask": {"mask": True, "causal": True},
    "all": {"bias": ("1", "H", "Sq", "Sk"), "mask": True, "causal": True},
}


def check(case, ours, peer, exact, dtype):
    """The shared budget, plus two roundings of the case's largest number: of the kept output, which the gradients are
    computed from, and of a result that the peer has exact by luck."""
    numbers = [x for x in (*case, *exact) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    rounding = 2 * torch.finfo(dtype).eps * max(float(x.abs().max()) for x in numbers)
    for name, a, b, e in zip(("out", "dq", "dk", "dv", "dbias"), ours, peer, exact, strict=False):
        assert_within_budget(name, a, b, e, rounding)


@pytest.mark.parametrize(("variant", "impl"), pairs(VARIANTS, [*IMPLS, TRITON]))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, variant, impl):
    if VARIANTS[variant].get("causal") and shape[1] > shape[2]:
        shape = (shape[0], shape[2], shape[1], *shape[3:])  # PyTorch has no answer for a query before every key
    case = rounded(make(shape, **VARIANTS[variant]), torch.float32)
    if case[4] is not None:
        case[4][:, 0] = True
    exact = run(pytorch, case, torch.float64)
    check(case, run(attention, case, torch.float32, impl=impl), run(pytorch, case, torch.float32), exact, torch.float32)


@pytest.mark.parametrize("impl", LEAN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, impl):
    case = rounded(make((2, 40, 50, 3, 8), bias=("1", "H", "Sq", "Sk"), mask=True), dtype)
    check(
        case,
        run(attention, case, dtype, impl=impl),
        run(pytorch, case, dtype),
        run(pytorch, case, torch.float64),
        dtype,
    )


@pytest.mark.parametrize("impl", [*LEAN, TRITON])
@pytest.mark.parametrize("shape", [(2, 200, 150, 1, 8), (1, 70, 170, 2, 8)], ids=str)
def test_the_diagonal_across_tiles(shape, impl):
    """Aligned at the last key, also where the first queries come before every key."""
    case = rounded(make(shape, mask=True, causal=True), torch.float32)
    exact = run(attention, case, torch.float64, impl="reference")
    peer = run(attention, case, torch.float32, impl="reference")
    check(case, run(attention, case, torch.float32, impl=impl), peer, exact, torch.float32)


@pytest.mark.parametrize(("variant", "impl"), pairs(VARIANTS, [*LEAN, TRITON]))
def test_dropout_is_that_of_the_reference(variant, impl):
    case = rounded(make((2, 35, 70, 3, 8), **VARIANTS[variant]), torch.float32)
    options = {"dropout_p": 0.3, "seed": -7}
    exact = run(attention, case, torch.float64, impl="reference", **options)
    peer = run(attention, case, torch.float32, impl="reference", **options)
    check(case, run(attention, case, torch.float32, impl=impl, **options), peer, exact, torch.float32)
    other = run(attention, case, torch.float32, impl=impl, dropout_p=0.3, seed=8)
    assert (other[0] - exact[0]).abs().max() > 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_constant_along_the_keys_changes_nothing(impl):
    case = make((2, 40, 50, 3, 8), bias=("1", "H", "Sq", "1"))
    out, _, _, _, dbias = run(attention, case, torch.float32, impl=impl)
    eps = torch.finfo(torch.float32).eps
    without = run(attention, (*case[:3], None, *case[4:]), torch.float64, impl="reference")[0]
    assert (out - without).abs().max() < 16 * eps * case[2].abs().max()
    dp = torch.einsum("bihd,bjhd->bhij", case[6], case[2])  # what cancels in the gradient, 0 in exact arithmetic
    assert dbias.shape == (1, 3, 40, 1)
    assert dbias.abs().max() < 8 * eps * dp.abs().max() * 2


@pytest.mark.parametrize("impl", [*IMPLS, TRITON])
@pytest.mark.parametrize("scale", [3 * 8**-0.5, -0.7, 0.0])
def test_scale(scale, impl):
    case = rounded(make((1, 20, 20, 2, 8), causal=True), torch.float32)
    scaled = [case[0] * scale, *case[1:]]
    out, dq, *rest = run(attention, scaled, torch.float64, impl="reference", scale=1.0)
    ours = run(attention, case, torch.float32, impl=impl, scale=scale)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, (out, dq * scale, *rest), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("impl", [*IMPLS, TRITON])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_query_without_a_key_gives_zeros_and_zero_gradients(impl, dropout_p):
    q, k, v, bias, mask, _, dout = make((3, 20, 18, 2, 8), bias=("1", "H", "Sq", "Sk"), mask=True)
    mask[1] = False  # a whole sample
    mask[2] = False
    mask[2, 15:] = True  # with causal, the first queries of another
    case = (q, k, v, None if impl == "triton" else bias, mask, True, dout)
    out, dq, dk, dv = run(attention, case, torch.float32, impl=impl, dropout_p=dropout_p, seed=1)[:4]
    blind = ~(torch.ones(20, 18, dtype=torch.bool).tril(-2) & mask[:, None]).any(-1)
    assert blind.sum() > 20
    assert out[blind].abs().max() == 0
    assert dq[blind].abs().max() == 0
    assert out[~blind].abs().amax((-1, -2)).min() > 0 or dropout_p > 0
    assert dk[1].abs().max() == 0
    assert dv[1].abs().max() == 0
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("impl", [pytest.param("native", marks=needs_native), TRITON])
def test_what_a_masked_key_holds_does_not_matter(impl):
    q, k, v, _, mask, _, dout = make((2, 20, 40, 2, 8), mask=True)
    expected = run(attention, (q, k, v, None, mask, False, dout), torch.float32, impl=impl)
    k[~mask], v[~mask] = torch.nan, torch.inf
    for a, b in zip(
        run(attention, (q, k, v, None, mask, False, dout), torch.float32, impl=impl), expected, strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", [*LEAN, TRITON])
def test_nan_is_not_hidden(impl):
    case = make((1, 20, 20, 1, 8))
    case[0][0, 3, 0, 2] = torch.nan
    out = run(attention, case, torch.float32, impl=impl)[0]
    assert out[0, 3].isnan().all()
    assert out[0, :3].isfinite().all()


@pytest.mark.parametrize("impl", [*LEAN, TRITON])
@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8)], ids=str)
def test_empty(shape, impl):
    case = make(shape, bias=None if impl == "triton" else ("1", "H", "Sq", "Sk"))
    out, dq, dk, dv, *dbias = run(attention, case, torch.float32, impl=impl)
    for x in (out, dq, dk, dv, *dbias):
        assert x.abs().sum() == 0
    assert (out.shape, dk.shape) == (dq.shape, dv.shape)


@pytest.mark.parametrize("impl", [*IMPLS, TRITON])
def test_views_need_no_copy_and_give_the_same(impl):
    packed = torch.randn(2, 50, 3, 4, 8)
    q, k, v = packed.unbind(2)
    out = attention(q, k, v, impl=impl)
    assert out.is_contiguous()
    assert torch.equal(out, attention(q.contiguous(), k.contiguous(), v.contiguous(), impl=impl))
    columns = torch.randn(2, 4, 8, 50).permute(0, 3, 1, 2)  # neighbouring channels are far apart
    assert torch.equal(attention(columns, k, v, impl=impl), attention(columns.contiguous(), k, v, impl=impl))
    shared = torch.randn(1, 50, 1, 8).expand(2, 50, 4, 8)
    assert torch.equal(attention(q, shared, v, impl=impl), attention(q, shared.contiguous(), v, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_of_a_bias(impl):
    q, k, v = torch.randn(2, 50, 3, 4, 8).unbind(2)
    bias = torch.randn(1, 4, 50, 50).transpose(2, 3)
    assert torch.equal(attention(q, k, v, bias=bias, impl=impl), attention(q, k, v, bias=bias.contiguous(), impl=impl))


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 20)),
    bias=st.sampled_from([None, ("1", "H", "Sq", "Sk"), ("B", "1", "Sq", "Sk"), ("1", "H", "1", "Sk")]),
    mask=st.booleans(),
    causal=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_native_agrees_with_the_formula_on_any_input(shape, bias, mask, causal, dropout_p, seed):
    case = rounded(make(shape, bias, mask, causal, seed % 1000), torch.float32)
    options = {"dropout_p": dropout_p, "seed": seed}
    exact = run(attention, case, torch.float64, impl="reference", **options)
    peer = run(attention, case, torch.float32, impl="recompute", **options)
    check(case, run(attention, case, torch.float32, impl="native", **options), peer, exact, torch.float32)


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 80), st.integers(1, 80), st.integers(1, 2), st.integers(1, 20)),
    mask=st.booleans(),
    causal=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_triton_agrees_with_the_formula_on_any_input(shape, mask, causal, dropout_p, seed):
    case = rounded(make(shape, None, mask, causal, seed % 1000), torch.float32)
    options = {"dropout_p": dropout_p, "seed": seed}
    exact = run(attention, case, torch.float64, impl="reference", **options)
    peer = run(attention, case, torch.float32, impl="recompute", **options)
    check(case, run(attention, case, torch.float32, impl="triton", **options), peer, exact, torch.float32)


def test_recompute_in_parts_gives_the_same(monkeypatch):
    case = make((3, 30, 20, 2, 8), bias=("1", "H", "Sq", "Sk"), mask=True, causal=True)
    options = {"impl": "recompute", "dropout_p": 0.2, "seed": 5}
    whole = run(attention, case, torch.float64, **options)
    for elements in (1, 7 * 2 * 20, 30 * 2 * 20):  # one query, seven queries, one sample at a time
        monkeypatch.setattr(recompute, "MAP_ELEMENTS", elements)
        for a, b in zip(run(attention, case, torch.float64, **options), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@needs_native
@pytest.mark.parametrize("bias", [None, ("1", "H", "Sq", "Sk"), ("B", "H", "Sq", "Sk")], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(bias):
    case = make((4, 70, 50, 3, 8), bias=bias)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(attention, case, torch.float32, impl="native", dropout_p=0.1, seed=3))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("variant", "impl"), pairs(VARIANTS, [*LEAN, TRITON]))
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_kept_for_backward(variant, dropout_p, impl):
    batch, length, heads, width = 2, 64, 3, 8
    _, _, _, bias, mask, causal, _ = make((batch, length, length, heads, width), **VARIANTS[variant])
    packed = torch.randn(batch, length, 3, heads, width, requires_grad=True)
    bias = None if bias is None else bias.float().requires_grad_()
    seed = torch.tensor(3)
    q, k, v = packed.unbind(2)
    saved, new, out = kept(
        lambda: attention(q, k, v, bias=bias, key_mask=mask, causal=causal, dropout_p=dropout_p, seed=seed, impl=impl),
        (packed, bias, mask, seed),
    )
    assert new == 4 * (batch * length * heads * width + 2 * batch * heads * length)  # out, two numbers a row
    maps = [x for x in saved if x.numel() >= length * length and x is not bias and x.shape[-1] == length]
    assert all(bias is not None and x.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr() for x in maps)
    assert out.grad_fn is not None


def test_the_reference_does_keep_the_map():
    """The measure above sees a map where there is one."""
    q, k, v = torch.randn(2, 64, 3, 3, 8, requires_grad=True).unbind(2)
    _, new, _ = kept(lambda: attention(q, k, v, impl="reference"), (q,))
    assert new >= 4 * 2 * 3 * 64 * 64


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3"])
def test_every_instruction_set(isa):
    """The tests of values once more, in a process that uses an older instruction set."""
    selected = [f"{__file__}::test_half_precision", f"{__file__}::test_dropout_is_that_of_the_reference"]
    environment = os.environ | {"TLFAST_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", *selected]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
