"""The feed-forward on the CPU: its Triton kernels interpreted, against float64 and within PyTorch's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tlfast
from tests.ops.feed_forward_cases import ACTIVATIONS, NAMES, assert_accurate, make, run, some_dy
from tests.ops.interpreter import interpreted
from tlfast.ops import _dispatch, feed_forward

SHAPES = [((1,), 16, 16), ((2, 63), 48, 100), ((65,), 96, 100), ((3, 5, 7), 33, 12), ((100,), 1, 1), ((), 63, 65)]

pytestmark = pytest.mark.usefixtures("poisoned")


def cases(*args, **kwargs):
    return [make(*args, **kwargs, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_reference_gradient(gated, bias):
    trained = [x for x in make((2, 3), 5, 7, torch.float64, gated, bias) if x is not None]

    def function(*tensors):
        given = iter(tensors)
        inputs = [None if x is None else next(given) for x in make((), 5, 7, gated=gated, bias=bias)]
        return feed_forward(*inputs, activation="gelu_tanh", impl="reference")

    assert torch.autograd.gradcheck(function, trained)


def test_reference_is_the_formula():
    x, up, up_bias, down, down_bias, gate, gate_bias = make((4,), 3, 6, gated=True)
    hidden = x @ up.T + up_bias
    plain = torch.relu(hidden) @ down.T + down_bias
    torch.testing.assert_close(feed_forward(x, up, up_bias, down, down_bias, activation="relu"), plain)
    gated = (F.silu(x @ gate.T + gate_bias) * hidden) @ down.T + down_bias
    inputs = (x, up, up_bias, down, down_bias, gate, gate_bias)
    torch.testing.assert_close(feed_forward(*inputs, activation="silu"), gated)


@interpreted
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape, width, hidden", SHAPES)
def test_float32_accuracy(shape, width, hidden, gated):
    assert_accurate(cases(shape, width, hidden, gated=gated), "triton")


@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated, bias):
    assert_accurate(cases((65,), 48, 20, gated=gated, bias=bias), "triton", activation)


@interpreted
@pytest.mark.parametrize("gated", [True, False])
def test_more_hidden_channels_than_a_tile(gated):
    assert_accurate(cases((5,), 20, 1100, gated=gated), "triton")


@interpreted
@pytest.mark.parametrize("gated", [True, False])
def test_strided_views(gated):
    torch.manual_seed(0)
    x, up, up_bias, down, *others = make((4, 6), 24, 10, gated=gated)
    dy = torch.randn(6, 4, 24).transpose(0, 1)
    columns, rows = torch.randn(4, 6, 60)[..., 7:31], torch.randn(4, 9, 24)[:, 2:8]
    views = [columns, rows, torch.randn(6, 4, 24).transpose(0, 1), torch.randn(4, 24, 6).mT]
    assert not any(view.is_contiguous() for view in (*views, dy))
    up, down = (weight.detach().T.contiguous().T.requires_grad_() for weight in (up, down))
    assert_accurate([(view.requires_grad_(), up, up_bias, down, *others) for view in views], "triton", dy=dy)
    constant = torch.ones(()).expand(4, 6, 24)  # what sum().backward() sends
    assert_accurate([(x, up, up_bias, down, *others)], "triton", dy=constant)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("shape, width, hidden", [((0,), 8, 4), ((3, 0), 8, 4), ((3,), 0, 4), ((3,), 8, 0)])
def test_empty(impl, shape, width, hidden):
    inputs = make(shape, width, hidden, gated=True)
    result = run(inputs, impl)
    expected = inputs[4].expand(*shape, width)
    assert torch.equal(result["y"], expected)
    for name, x in zip(NAMES, inputs, strict=True):
        assert result[name].shape == x.shape
        if name != "ddown_bias":
            assert not result[name].any(), f"{name} of nothing is zero"
    torch.testing.assert_close(result["ddown_bias"], some_dy(expected.contiguous()).flatten(0, -2).sum(0))


@interpreted
@settings(max_examples=12)
@given(data=st.data())
def test_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3), label="leading dimensions"))
    width, hidden = data.draw(st.integers(1, 70), label="R"), data.draw(st.integers(1, 70), label="F")
    gated, bias = data.draw(st.booleans(), label="gated"), data.draw(st.booleans(), label="bias")
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    assert_accurate(cases(shape, width, hidden, gated=gated, bias=bias), "triton", activation)


@interpreted
def test_only_what_needs_a_gradient():
    inputs = make((7,), 12, 6, gated=True)
    everything = run(inputs, "triton")
    for position, name in enumerate(NAMES):
        only = [x.detach().requires_grad_(i == position) for i, x in enumerate(inputs)]
        feed_forward(*only, impl="triton").backward(torch.cos(torch.arange(84)).view(7, 12))
        assert torch.equal(only[position].grad, everything[name]), name
        assert all(x.grad is None for i, x in enumerate(only) if i != position)


@interpreted
def test_keeps_x_alone():
    inputs = make((8, 16), 32, 64)
    given = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        feed_forward(*inputs, impl="triton")
    assert set(kept) <= given and inputs[0].data_ptr() in kept


@interpreted
def test_nan_stays_in_its_row():
    x, *weights = (None if t is None else t.detach() for t in make((5,), 16, 24))
    x[2, 3] = torch.nan
    for activation in ACTIVATIONS:
        y = feed_forward(x, *weights, activation=activation, impl="triton")
        assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


@interpreted
def test_no_double_backward():
    inputs = make((3,), 4, 2)
    grad = torch.autograd.grad(feed_forward(*inputs, impl="triton").square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, ["x", "int64", "floating-point"]),
        ({"x": torch.zeros(2, 4)}, ["x", "(..., 3)", "(2, 4)"]),
        ({"x": torch.zeros(())}, ["x", "(..., 3)", "()"]),
        ({"up_weight": torch.zeros(5)}, ["up_weight", "(F, R)", "(5,)"]),
        ({"up_weight": None}, ["up_weight", "NoneType"]),
        ({"up_bias": torch.zeros(3)}, ["up_bias", "(5,)", "(3,)"]),
        ({"up_bias": 0.5}, ["up_bias", "float"]),
        ({"down_weight": torch.zeros(5, 3)}, ["down_weight", "(3, 5)", "(5, 3)"]),
        ({"down_bias": torch.zeros(5)}, ["down_bias", "(3,)", "(5,)"]),
        ({"down_bias": torch.zeros(3, device="meta")}, ["down_bias", "meta", "cpu"]),
        ({"gate_weight": torch.zeros(3, 5)}, ["gate_weight", "(5, 3)", "(3, 5)"]),
        ({"gate_bias": torch.zeros(5)}, ["gate_bias", "gate_weight", "both"]),
        ({"down_weight": torch.zeros(3, 5).bfloat16()}, ["down_weight", "float32", "bfloat16", "down_weight.to("]),
        ({"activation": "tanh"}, ["activation", "'tanh'", "'gelu'"]),
        ({"impl": "native"}, ["impl='native'", "feed_forward", "triton"]),
    ],
)
def test_misuse(change, words):
    arguments = {
        "x": torch.zeros(2, 3),
        "up_weight": torch.zeros(5, 3),
        "up_bias": torch.zeros(5),
        "down_weight": torch.zeros(3, 5),
        "down_bias": torch.zeros(3),
    }
    with pytest.raises(ValueError) as error:
        feed_forward(**{**arguments, **change})
    for word in words:
        assert word in str(error.value)


@interpreted
def test_a_named_implementation_never_falls_back():
    inputs = make((2,), 3, 5)
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot run: it takes float32.*float64.*reference"):
        feed_forward(*(None if x is None else x.detach().double() for x in inputs), impl="triton")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        feed_forward(*(None if x is None else x.detach().bfloat16() for x in inputs), impl="triton")
    with pytest.raises(RuntimeError, match="it needs cuda tensors and was given meta ones"):
        feed_forward(*(None if x is None else x.detach().to("meta") for x in inputs), impl="triton")


def test_auto_on_the_cpu_is_plain_pytorch(monkeypatch):
    taken = []
    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda *args: taken.append(choose(*args)) or taken[-1])
    inputs = make((2,), 3, 5)
    feed_forward(*inputs)
    feed_forward(*(None if x is None else x.detach().to("meta") for x in inputs))
    assert taken == ["reference", "reference"]


def test_implementations():
    found = tlfast.ops.implementations("feed_forward")
    assert list(found) == ["reference", "triton"]
    assert tlfast.ops.describe()["feed_forward"]["auto"] == ("triton" if torch.cuda.is_available() else "reference")
