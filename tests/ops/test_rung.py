"""The rung on the CPU: every implementation that runs there, against float64 and within PyTorch's own error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tlfast
from tests.ops.interpreter import interpreted
from tests.ops.rung_cases import NAMES, assert_accurate, make, run
from tlfast.ops import _dispatch, rung

IMPLS = ["native", pytest.param("triton", marks=interpreted)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((1,), 16, 16), ((2, 63), 100, 48), ((65,), 768, 96), ((3, 5, 7), 33, 12), ((100,), 1, 1), ((), 63, 65)]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_reference_gradient(per_channel, bias):
    h, s, weight, bias, alpha = (
        None if x is None else x.detach().double() for x in make((2, 3), 7, 5, per_channel=per_channel, bias=bias)
    )
    trained = [x.requires_grad_() for x in (s, weight, alpha, *([] if bias is None else [bias]))]

    def function(s, weight, alpha, bias=None):
        return rung(h, s, weight, bias, alpha, temperature=0.7, impl="reference")

    assert torch.autograd.gradcheck(function, trained)


def cases_of(shape, depth, width, per_channel, bias):
    seeds = range(4 if depth * width > 100 else 32)  # a few sums alone are exact, or not, by luck
    return [make(shape, depth, width, per_channel=per_channel, bias=bias, seed=i) for i in seeds]


def test_reference_is_the_formula():
    h, s, weight, bias, alpha = make((4,), 3, 2)
    mu = 1 / (1 + torch.exp(-alpha / 0.1))
    expected = mu * s + (1 - mu) * (h @ weight.T + bias)
    torch.testing.assert_close(rung(h, s, weight, bias, alpha, impl="reference"), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape, depth, width", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_float32_accuracy(impl, shape, depth, width, per_channel, bias):
    assert_accurate(cases_of(shape, depth, width, per_channel, bias), impl)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("s_dtype", DTYPES)
@pytest.mark.parametrize("h_dtype", DTYPES)
def test_half_precision_accuracy(h_dtype, s_dtype, per_channel):
    assert_accurate([make((3, 65), 96, 48, h_dtype, s_dtype, per_channel, seed=i) for i in range(4)], "native")


def test_many_rows_use_several_chunks(two_threads):
    assert_accurate([make((5000,), 20, 100, per_channel=True)], "native")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl):
    torch.manual_seed(0)
    h, s, weight, bias, alpha = make((4, 6), 24, 10, per_channel=True)
    side = torch.randn(4, 6, 32)[..., 5:15].requires_grad_()
    dz = torch.randn(6, 4, 10).transpose(0, 1)
    columns, rows = torch.randn(4, 6, 60)[..., 7:31], torch.randn(4, 9, 24)[:, 2:8]
    views = [columns, rows, torch.randn(6, 4, 24).transpose(0, 1), torch.randn(4, 24, 6).mT]
    assert not any(view.is_contiguous() for view in (*views, side, dz))
    assert_accurate([(view, side, weight, bias, alpha) for view in views], impl, dz)
    constant = torch.ones(()).expand(4, 6, 10)  # what sum().backward() sends
    columns_first = weight.detach().T.contiguous().T.requires_grad_()
    assert_accurate([(view, s, columns_first, bias, alpha) for view in (h, *views)], impl, constant)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("shape, depth, width", [((0,), 8, 4), ((3, 0), 8, 4), ((3,), 8, 0)])
def test_empty(impl, shape, depth, width):
    inputs = make(shape, depth, width)
    result = run(inputs, impl)
    for name, x in zip(NAMES[1:], inputs[1:], strict=True):
        assert result[name].shape == x.shape
        assert not result[name].any(), f"{name} of no rows is zero"
    assert result["z"].shape == (*shape, width)


@pytest.mark.parametrize("impl", IMPLS)
@given(data=st.data())
def test_any_shape(impl, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3), label="leading dimensions"))
    depth, width = data.draw(st.integers(1, 70), label="D"), data.draw(st.integers(1, 70), label="R")
    per_channel, bias = data.draw(st.booleans(), label="gate per channel"), data.draw(st.booleans(), label="bias")
    assert_accurate(cases_of(shape, depth, width, per_channel, bias), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_needs_a_gradient(impl):
    inputs = make((7,), 12, 6)
    everything = run(inputs, impl)
    for position, name in enumerate(NAMES[1:], start=1):
        only = [x.detach().requires_grad_(i == position) for i, x in enumerate(inputs)]
        rung(*only, impl=impl).backward(torch.cos(torch.arange(42)).view(7, 6))
        torch.testing.assert_close(only[position].grad, everything[name])
        assert all(x.grad is None for i, x in enumerate(only) if i != position)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_closed_and_open_gates(impl):
    h, s, weight, bias, _ = make((9,), 8, 4)
    for alpha, expected in ((50.0, s), (-50.0, h @ weight.T + bias)):
        inputs = (h, s, weight, bias, torch.tensor(alpha, requires_grad=True))
        result = run(inputs, impl)
        torch.testing.assert_close(result["z"], expected.detach())
        assert all(torch.isfinite(x).all() for x in result.values())


def test_same_bits_for_any_number_of_threads(two_threads):
    inputs = make((3000,), 16, 96, per_channel=True)
    two = run(inputs, "native")
    torch.set_num_threads(1)
    one = run(inputs, "native")
    for name in ("ds", "dbias", "dalpha"):
        assert torch.equal(one[name], two[name]), name


def test_saves_nothing_of_its_own():
    h, s, weight, bias, alpha = make((8, 16), 64, 32)
    before = {x.untyped_storage().data_ptr() for x in (h, s, weight, bias, alpha)}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        z = rung(h, s, weight, bias, alpha, impl="native")
    new = {pointer: size for pointer, size in saved.items() if pointer not in before}
    assert new == {z.untyped_storage().data_ptr(): 4 * 8 * 16 * 32}


def test_forward_allocates_only_its_output():
    h, s, weight, bias, alpha = make((8, 16), 64, 32)
    rung(h, s, weight, bias, alpha, impl="native")  # the first call probes the routes of the product
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        z = rung(h, s, weight, bias, alpha, impl="native")
    kept = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert kept == z.untyped_storage().nbytes()


def test_no_double_backward():
    inputs = make((3,), 4, 2)
    grad = torch.autograd.grad(rung(*inputs, impl="native").square().sum(), inputs[1], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"h": torch.zeros(2, 3, dtype=torch.int64)}, ["h", "int64", "floating-point"]),
        ({"h": torch.zeros(2, 4)}, ["h", "(..., 3)", "(2, 4)"]),
        ({"h": torch.zeros(2, 3, requires_grad=True)}, ["h", "gradient", "detach()"]),
        ({"s": torch.zeros(3, 5)}, ["s", "(2, 5)", "(3, 5)"]),
        ({"s": None}, ["s", "NoneType"]),
        ({"weight": torch.zeros(5)}, ["weight", "(R, D)", "(5,)"]),
        ({"bias": torch.zeros(3)}, ["bias", "(5,)", "(3,)"]),
        ({"alpha": torch.zeros(2)}, ["alpha", "(5,)", "(2,)"]),
        ({"alpha": torch.zeros(5, device="meta")}, ["alpha", "meta", "cpu"]),
        ({"temperature": 0.0}, ["temperature", "positive", "0.0"]),
        ({"temperature": float("inf")}, ["temperature", "finite"]),
        ({"impl": "fast"}, ["impl='fast'", "rung", "native"]),
    ],
)
def test_misuse(change, words):
    arguments = {
        "h": torch.zeros(2, 3),
        "s": torch.zeros(2, 5),
        "weight": torch.zeros(5, 3),
        "bias": torch.zeros(5),
        "alpha": torch.zeros(()),
    }
    with pytest.raises(ValueError) as error:
        rung(**{**arguments, **change})
    for word in words:
        assert word in str(error.value)


def test_h_that_requires_a_gradient_is_fine_without_grad_mode():
    h, s, weight, bias, alpha = make((2,), 3, 5)
    with torch.no_grad():
        rung(h.requires_grad_(), s, weight, bias, alpha)


def test_a_named_implementation_never_falls_back():
    inputs = make((2,), 3, 5)
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: it takes float32.*float64.*reference"):
        rung(*(x.detach().double() for x in inputs), impl="native")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="impl='cuda' cannot run"):
            rung(*inputs, impl="cuda")
    with pytest.raises(RuntimeError, match="it needs cpu tensors and was given meta ones"):
        rung(*(x.detach().to("meta") for x in inputs), impl="native")


@interpreted
def test_triton_refuses_a_side_too_wide_for_a_program():
    rung(*make((2,), 3, 512), impl="triton")
    with pytest.raises(RuntimeError, match="at most 512, not 513"):
        rung(*make((2,), 3, 513), impl="triton")


@interpreted
def test_interpreted_bfloat16_is_refused():
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        rung(*make((2,), 3, 5, h_dtype=torch.bfloat16), impl="triton")


def test_auto(monkeypatch):
    taken = []
    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda *args: taken.append(choose(*args)) or taken[-1])
    inputs = make((2,), 3, 5)
    rung(*inputs)
    rung(*(x.detach().double() for x in inputs))
    rung(*(x.detach().to("meta") for x in inputs))
    assert taken == ["native", "reference", "reference"]


@pytest.mark.parametrize(
    "h_dtype, missing, expected",
    [
        (torch.float32, (), "cuda"),
        (torch.bfloat16, (), "triton"),
        (torch.float32, ("cuda",), "triton"),
        (torch.float32, ("triton",), "cuda"),
        (torch.float64, (), "reference"),
    ],
)
def test_what_auto_takes_on_a_gpu(h_dtype, missing, expected, monkeypatch):
    monkeypatch.setattr(_dispatch, "MISSING", dict.fromkeys(missing, "blocked"))
    monkeypatch.setattr(_dispatch, "TRITON_INTERPRETED", False)
    monkeypatch.setitem(_dispatch.ORDER, "meta", _dispatch.ORDER["cuda"])
    taken = []
    choose = _dispatch.choose

    def watched(*args):
        taken.append(choose(*args))
        return "reference"  # shapes are enough

    monkeypatch.setattr(_dispatch, "choose", watched)
    rung(*(x.detach().to("meta") for x in make((2,), 3, 5, h_dtype)))
    assert taken == [expected]


def test_implementations():
    found = tlfast.ops.implementations("rung")
    assert list(found) == ["reference", "native", "triton", "cuda"]
    assert found["reference"] == found["native"] == "available"
    row = tlfast.ops.describe()["rung"]
    assert row["implementations"] == found
    assert row["auto"] == ("triton" if torch.cuda.is_available() else "native")
    assert "first choice" in row["why"]
    with pytest.raises(ValueError, match=r"op='rang' is not an operation: use one of .*'rung'"):
        tlfast.ops.implementations("rang")


@interpreted
def test_float32_sums_keep_what_they_round_away():
    large, ones = 2.0**25, 64  # between large and twice it float32 has every fourth integer
    h = torch.zeros(1, 32 * ones)
    h[0, ::32] = 1  # one in each tile
    h[0, 1] = large
    closed = torch.tensor(-1e3)  # the gate: z is the product
    z = rung(h, torch.zeros(1, 3), torch.ones(3, 32 * ones), None, closed, impl="triton")
    assert (z == large + ones).all()
    bias = torch.zeros(3, requires_grad=True)
    dz = torch.ones(ones + 2, 3)
    dz[0], dz[-1] = large, -large
    z = rung(torch.zeros(ones + 2, 5), torch.zeros(ones + 2, 3), torch.ones(3, 5), bias, closed, impl="triton")
    assert (torch.autograd.grad(z, bias, dz)[0] == ones).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_infinities_stay_in_their_row(impl):
    inputs = make((3,), 100, 5)
    expected = rung(*inputs, impl=impl)
    inputs[0][1, 3] = torch.inf
    z = rung(*inputs, impl=impl)
    assert z[1].isinf().all() and torch.equal(z[1] > 0, inputs[2][:, 3] > 0)
    assert torch.equal(z[::2], expected[::2])


@interpreted
def test_float32_products_follow_pytorchs_switch(monkeypatch):
    from tlfast.ops._triton import precision

    assert precision() == "ieee"
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    assert precision() == "tf32"
    for allowed, expected in ((True, "tf32"), (False, "ieee")):  # as before PyTorch 2.9
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert precision() == expected
