"""norm_tap: sum, norm and quantised rows within PyTorch's own error of float64; hard rows, PyTorch's machinery."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tests.ops.interpreter import interpreted
from tests.ops.norm_cases import needs_native
from tlfast import ops
from tlfast.ops import _dispatch, norm_tap, quantise_rows

IMPLS = ["reference", pytest.param("native", marks=needs_native), pytest.param("triton", marks=interpreted)]
RUNS = [
    *(("reference", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(pytest.param("native", dtype, marks=needs_native) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(pytest.param("triton", dtype, marks=interpreted) for dtype in (torch.float32, torch.float16)),
]
SHAPES = [(1, 1), (2, 63, 96), (65, 100), (3, 5, 7, 48), (7,), (300, 33), (5, 4096)]
EPS = 1e-5


def make(shape, dtype=torch.float32, offset=0.0, device="cpu"):
    """x, residual, weight and bias."""
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, device=device) for _ in range(2))
    weight, bias = torch.randn(shape[-1], device=device), torch.randn(shape[-1], device=device)
    return x.to(dtype), (residual + offset).to(dtype), weight, bias


def plain(x, residual, weight, bias, eps=EPS, rms=False):
    """The formula with PyTorch's operations at the dtype of x."""
    total = x if residual is None else x + residual
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if not rms:
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    y = F.rms_norm(total, total.shape[-1:], weight, eps)
    return total, y if bias is None else y + bias


def check(inputs, impl, rms=False, eps=EPS, quantise=None):
    exact = plain(*(None if t is None else t.double() for t in inputs), eps, rms)
    # one rounding of the largest number: a result can be exact in PyTorch by luck
    numbers = [*(t for t in inputs if t is not None), *exact]
    rounding = torch.finfo(torch.float32).eps * max((float(t.abs().max()) for t in numbers if t.numel()), default=0.0)
    total, y, *quantised = norm_tap(*inputs, eps, rms, quantise, impl=impl)
    peers = plain(*inputs, eps, rms)
    assert total.is_contiguous() and y.is_contiguous()
    assert_within_budget("total", total, peers[0], exact[0], rounding)
    assert_within_budget("y", y, peers[1], exact[1], rounding)
    if quantise is not None:
        check_quantised(*quantised[0], exact[1], quantise, rounding)


def check_quantised(values, scale, exact, dtype, rounding):
    """Half a step of the quantisation, and what float32 adds to the exact y, at most."""
    largest = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    assert values.dtype == dtype and scale.dtype == torch.float32
    assert values.shape == exact.shape and scale.shape == exact.shape[:-1]
    exact_scale = exact.abs().amax(-1) / largest
    noise = 8 * rounding + 4 * torch.finfo(torch.float32).eps * exact.abs()
    assert torch.all((scale - exact_scale).abs() * largest <= noise.amax(-1))
    steps = exact_scale.unsqueeze(-1)
    half = steps / 2 if dtype == torch.int8 else torch.maximum(exact.abs() * 2**-4, steps * 2**-10)
    assert torch.all((values.double() * scale.double().unsqueeze(-1) - exact).abs() <= half + 2 * noise)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl, dtype", RUNS)
def test_accuracy(impl, dtype, shape, rms):
    check(make(shape, dtype), impl, rms)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("quantise", [None, torch.int8])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_may_be_absent(impl, rms, quantise):
    x, *others = make((9, 65))
    for kept in itertools.product((True, False), repeat=3):
        inputs = (x, *(t if keep else None for t, keep in zip(others, kept, strict=True)))
        check(inputs, impl, rms, quantise=quantise)
        if not kept[0]:
            assert norm_tap(*inputs, EPS, rms, quantise, impl=impl)[0] is x


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("impl, dtype", RUNS)
def test_int8(impl, dtype, shape):
    check(make(shape, dtype), impl, quantise=torch.int8)


def test_float8():
    check(make((9, 100)), "auto", quantise=torch.float8_e4m3fn)


@needs_native
@pytest.mark.usefixtures("poisoned", "two_threads")
@given(rows=st.integers(1, 300), width=st.integers(2, 150), rms=st.booleans(), dtype=st.sampled_from(["32", "b16"]))
def test_native_on_any_shape(rows, width, rms, dtype):
    inputs = make((rows, width), {"32": torch.float32, "b16": torch.bfloat16}[dtype])
    check(inputs, "native", rms, quantise=torch.int8)


@pytest.mark.parametrize("impl", IMPLS)
def test_y_comes_from_the_unrounded_sum(impl):
    """In float16 1 + 2^-12 is 1: a norm of rounded sums would be 0 all over."""
    x, residual = torch.ones(1, 8).half(), (torch.arange(8.0) * 2**-15).half()[None]
    total, y = norm_tap(x, residual, eps=1e-12, impl=impl)
    assert torch.equal(total, torch.ones(1, 8).half())
    exact = F.layer_norm(x.double() + residual.double(), (8,), eps=1e-12)
    torch.testing.assert_close(y.double(), exact, rtol=2**-11, atol=2**-11)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("impl", IMPLS)
def test_constant_rows(impl, rms):
    """Of variance 0: y is the bias. 0.1 has no exact sum, and a row of zeros nothing to divide by."""
    weight, bias = torch.randn(37), torch.randn(37)
    x = torch.tensor([0.0, 0.1, -1e6, 3e-39]).unsqueeze(-1).expand(4, 37)
    y = norm_tap(x, None, weight, bias, 1e-12, rms, impl=impl)[1]
    if rms:
        check((x[:3].contiguous(), None, weight, bias), impl, rms=True, eps=1e-12)
    else:
        torch.testing.assert_close(y, bias.expand(4, 37), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("impl", IMPLS[1:])  # PyTorch's own norm has no second look at the mean
def test_a_common_offset_does_not_cancel(impl, offset):
    """Against the exact norm of the rounded sum: far from 0 the mean itself is rounded by much."""
    x = torch.randn(5, 300) + offset
    exact = F.layer_norm(x.double(), (300,), eps=EPS)
    y = norm_tap(x, eps=EPS, impl=impl)[1]
    torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-6)


@pytest.mark.parametrize("quantise", [None, torch.int8])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("impl, dtype", RUNS)
def test_nan_and_infinity_stay_in_their_rows(impl, dtype, rms, quantise):
    x, *others = make((6, 70), dtype)
    before = norm_tap(x, *others, EPS, rms, quantise, impl=impl)
    for row, number in ((0, torch.nan), (3, torch.inf), (4, -torch.inf)):
        x[row, 5] = number
    total, y, *quantised = norm_tap(x, *others, EPS, rms, quantise, impl=impl)
    for row in (1, 2, 5):
        assert torch.equal(total[row], before[0][row]) and torch.equal(y[row], before[1][row])
    assert total[0, 5].isnan() and total[3, 5] == torch.inf and total[4, 5] == -torch.inf
    assert all(not y[row].isfinite().all() for row in (0, 3, 4))
    if quantise is not None:
        values, scale = quantised[0]
        assert not scale[[0, 3, 4]].isfinite().any() and not values[[0, 3, 4]].any()
        assert torch.equal(values[[1, 2, 5]], before[2][0][[1, 2, 5]])


@pytest.mark.parametrize("impl", IMPLS)
def test_values_are_those_of_quantise_rows(impl):
    inputs = make((33, 130))
    _, y, (values, scale) = norm_tap(*inputs, quantise=torch.int8, impl=impl)
    expected = quantise_rows(y, impl=impl)
    assert torch.equal(values, expected[0]) and torch.equal(scale, expected[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl):
    wide = torch.randn(6, 4, 100)
    weight, bias = torch.randn(40)[::2], torch.randn(40)[1::2]
    views = [wide[..., 20:40], wide[..., 40:60], wide.transpose(0, 1).transpose(0, 1)[..., 60:80]]
    views += [torch.randn(4, 6, 20).transpose(0, 1), torch.randn(6, 20, 4).mT, torch.randn(6, 1, 20).expand(6, 4, 20)]
    for x, residual in itertools.permutations(views, 2):
        expected = norm_tap(x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), impl=impl)
        for ours, dense in zip(norm_tap(x, residual, weight, bias, impl=impl), expected, strict=True):
            assert torch.equal(ours, dense)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, shape):
    total, y, (values, scale) = norm_tap(*make(shape), quantise=torch.int8, impl=impl)
    assert total.shape == y.shape == values.shape == shape and scale.shape == shape[:-1]


@needs_native
@pytest.mark.parametrize("shape", [(2048, 96), (131, 17), (3, 20000)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    inputs, before, found = make(shape, torch.bfloat16), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        total, y, quantised = norm_tap(*inputs, quantise=torch.int8, impl="native")
        found.append((total, y, *quantised))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4", "vnni"])
def test_every_instruction_set_agrees(isa, fresh_process):
    code = (
        "import torch, tlfast\n"
        "torch.manual_seed(0); x, residual, weight = torch.randn(64, 1003), torch.randn(64, 1003), torch.randn(1003)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    total, y = tlfast.ops.norm_tap(x.to(dtype), residual.to(dtype), weight, impl='native')\n"
        "    exact = torch.nn.functional.layer_norm(x.to(dtype).double() + residual.to(dtype).double(), (1003,))\n"
        "    exact = exact * weight.double()\n"
        "    beyond = (y.double() - exact).abs() - torch.finfo(dtype).eps / 2 * exact.abs()\n"
        "    good = bool(beyond.max() < 2 * torch.finfo(torch.float32).eps * exact.abs().max())\n"
        "    print(hash(total.view(torch.uint8).numpy().tobytes()), good)\n"
    )
    best = fresh_process(code, PYTHONHASHSEED="0")
    assert "False" not in best and fresh_process(code, PYTHONHASHSEED="0", TLFAST_CPU_ISA=isa) == best


@needs_native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_rounded_as_pytorch_rounds_them(dtype):
    """Every number of the dtype plus one of every size; subnormal results may be 0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.isfinite()].view(-1, 64)
    residual = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))].view_as(x)
    total, expected = norm_tap(x, residual, impl="native")[0], (x.float() + residual.float()).to(dtype)
    normal = expected.abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(total[normal], expected[normal])
    assert not total[~normal].float().abs().gt(torch.finfo(torch.float32).tiny).any()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantise", [None, torch.int8])
def test_opcheck(quantise, dtype):
    x, residual, weight, bias = make((2, 5, 12), dtype)
    for others in ((residual, weight, bias), (None, None, None)):
        torch.library.opcheck(torch.ops.tlfast.norm_tap.default, (x, *others, EPS, False, quantise, "native"))


@pytest.mark.parametrize("quantise", [None, torch.int8])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_into_one_graph(impl, quantise):
    def step(x, residual, weight, bias):
        total, y, *quantised = norm_tap(x * 2, residual, weight, bias, quantise=quantise, impl=impl)
        return total, y, *(quantised[0] if quantised else ())

    inputs = make((5, 24))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(*inputs), step(*inputs), strict=True):
        torch.testing.assert_close(ours, eager)


def test_without_a_graph_and_with_one_the_results_are_the_same():
    inputs = make((5, 24), torch.bfloat16)
    with torch.inference_mode():
        direct = norm_tap(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(direct, norm_tap(*inputs), strict=True))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, ["x", "int64", "float32"]),
        ({"x": None}, ["x", "NoneType"]),
        ({"x": torch.zeros(())}, ["x", "(..., D)", "()"]),
        ({"x": torch.zeros(2, 0)}, ["x", "D >= 1", "(2, 0)"]),
        ({"x": torch.zeros(2, 3, requires_grad=True)}, ["x", "gradient", "no_grad"]),
        ({"residual": torch.zeros(3, 3)}, ["residual", "(2, 3)", "(3, 3)"]),
        ({"residual": torch.zeros(2, 3).half()}, ["residual", "float32", "float16"]),
        ({"weight": torch.zeros(4)}, ["weight", "(3,)", "(4,)"]),
        ({"weight": torch.zeros(3).bfloat16()}, ["weight", "float32", "bfloat16", "weight.to"]),
        ({"weight": torch.zeros(3, requires_grad=True)}, ["weight", "gradient", "no_grad"]),
        ({"bias": torch.zeros(3, device="meta")}, ["bias", "meta", "cpu"]),
        ({"eps": 0.0}, ["eps", "positive", "0.0"]),
        ({"eps": float("nan")}, ["eps", "finite"]),
        ({"quantise": torch.uint8}, ["quantise", "uint8", "int8", "float8_e4m3fn"]),
        ({"impl": "fast"}, ["impl='fast'", "norm_tap", "native"]),
    ],
)
def test_misuse(change, words):
    given = {"x": torch.zeros(2, 3), "residual": torch.zeros(2, 3), "weight": torch.zeros(3), "bias": torch.zeros(3)}
    with pytest.raises(ValueError) as error:
        norm_tap(**{**given, **change})
    for word in words:
        assert word in str(error.value)


def test_a_named_implementation_never_falls_back():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*float64.*reference"):
        norm_tap(x.double(), impl="native")
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*int8.*float8_e4m3fn"):
        norm_tap(x, quantise=torch.float8_e4m3fn, impl="native")
    assert norm_tap(x.double())[1].dtype == torch.float64
    assert set(ops.implementations("norm_tap")) == {"reference", "native", "triton"}


@interpreted
def test_what_triton_cannot_take_is_refused():
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 and float8 wrongly"):
        norm_tap(torch.randn(2, 3).bfloat16(), impl="triton")
    with pytest.raises(RuntimeError, match="D up to 16384, not 16385"):
        norm_tap(torch.randn(1, 16385), impl="triton")


@needs_native
def test_auto_takes_native(monkeypatch):
    taken = []
    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda *args: taken.append(choose(*args)) or taken[-1])
    with torch.no_grad():
        norm_tap(torch.randn(2, 3, requires_grad=True))
    assert taken == ["native"]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("quantise", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [*SHAPES[1:], (3, 16384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, shape, rms, quantise):
    if quantise == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    check(make(shape, dtype, device="cuda"), "triton", rms, quantise=quantise)
