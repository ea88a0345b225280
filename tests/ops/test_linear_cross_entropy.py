"""The cross-entropy of a frozen head: what it returns and keeps, PyTorch's machinery, choice and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import peak_bytes
from tests.budget import assert_within_budget
from tlfast import ops
from tlfast.bench.measure import saved_bytes
from tlfast.ops import FrozenWeight, linear_cross_entropy
from tlfast.ops.linear_cross_entropy import recompute

SETTINGS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"cap": 3.0},
    "all": {"scale": 0.5, "cap": 5.0, "bias": True},
}


def make(tokens, vocabulary=37, width=24, dtype=torch.float32, ignored=True, seed=0):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    if ignored:
        labels[::3] = -100
    return hidden, weight, labels


def settings_of(name, vocabulary=37):
    found = dict(SETTINGS[name])
    if found.pop("bias", False):
        found["bias"] = torch.linspace(-1, 1, vocabulary)
    return found


def plain(hidden, weight, labels, bias=None, scale=1.0, cap=None, reduction="mean"):
    """As a model's own forward and loss compute it."""
    logits = F.linear(hidden * scale, weight)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if bias is not None:
        logits = logits + bias
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)


def with_gradient(function, hidden, *arguments, **settings):
    hidden = hidden.clone().requires_grad_()
    loss = function(hidden, *arguments, **settings)
    (3.0 * loss).backward()
    return loss.detach(), hidden.grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tokens, rows", [(1, 1), (63, 5), (100, 100), (65, 64)])
def test_loss_and_gradient_err_as_plain_pytorch_does(tokens, rows, settings, dtype, monkeypatch):
    monkeypatch.setattr(recompute, "rows_at_once", lambda *sizes: rows)
    found = settings_of(settings)
    for reduction in ("mean", "sum"):
        ours, theirs, exact = [], [], []
        for seed in range(8):  # one loss may be right by chance
            hidden, weight, labels = make(tokens, dtype=dtype, ignored=tokens > 1, seed=seed)
            given = {**found, "reduction": reduction}
            ours.append(with_gradient(linear_cross_entropy, hidden, weight, labels, **given, impl="recompute"))
            theirs.append(with_gradient(plain, hidden, weight, labels, **given))
            exact.append(with_gradient(plain, hidden.double(), weight.double(), labels, **given))
        losses, gradients = ([torch.stack([x[i] for x in y]) for y in (ours, theirs, exact)] for i in (0, 1))
        assert_within_budget("loss", *losses)
        # ours rounds the gradient of the sum, and once more what scales it
        assert_within_budget("gradient", *gradients, gradients[2].abs() * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", ["reference", "recompute"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradcheck(settings, impl):
    hidden, weight, labels = make(7, 5, 4, torch.float64)
    found = settings_of(settings, 5)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, labels, **found, impl=impl), (hidden,))


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_head_in_fewer_bits(precision):
    hidden, weight, labels = make(33)
    stored = FrozenWeight.of(weight, precision=precision)
    loss, gradient = with_gradient(linear_cross_entropy, hidden, stored, labels, scale=0.5, impl="recompute")
    expected = with_gradient(plain, hidden, stored.value(), labels, scale=0.5)
    assert abs(loss - expected[0]) <= 0.02 * expected[0]  # the product rounds hidden, too
    assert (gradient - expected[1]).norm() <= 0.05 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("need_gradient", [True, False])
def test_opcheck(dtype, need_gradient):
    hidden, weight, labels = make(9, dtype=dtype)
    dense = ("dense", *weight.shape, weight, None, None, None, torch.zeros(37), 0.5, 2.0)
    operator = torch.ops.tlfast.linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, labels, *dense, -100, need_gradient, "recompute"))


def test_it_compiles_whole():
    hidden, weight, labels = make(12)

    def step(hidden):
        return linear_cross_entropy(hidden * 2, weight, labels, cap=4.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, expected = with_gradient(compiled, hidden), with_gradient(step, hidden)
    torch.testing.assert_close(ours, expected)


def test_autocast_decides_the_dtype():
    hidden, weight, labels = make(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = with_gradient(linear_cross_entropy, hidden, weight, labels)
    expected = with_gradient(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_one_gradient_and_makes_no_more_than_a_part_of_the_logits(dtype, monkeypatch):
    tokens, vocabulary, width = 64, 2000, 32
    monkeypatch.setattr(recompute, "MAP_ELEMENTS", 8 * vocabulary)
    hidden, weight, labels = make(tokens, vocabulary, width, dtype, ignored=False)
    hidden.requires_grad_()

    def step():
        return linear_cross_entropy(hidden, weight, labels)

    step()
    small = 8192  # a number a token, and so on
    kept = tokens * width * dtype.itemsize
    assert kept <= saved_bytes(step) <= kept + small
    part = 8 * vocabulary * 4
    # in bfloat16 what is multiplied by W, and PyTorch's product copies W
    halves = part // 2 + weight.nbytes if dtype == torch.bfloat16 else 0
    assert peak_bytes(step) <= kept + part + halves + small + 8 * width * 4
    assert part + halves + kept + 2 * small < tokens * vocabulary * 4, "the slack is too small for all logits"


def test_no_gradient_asked_for_keeps_nothing():
    hidden, weight, labels = make(50)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels).detach())


def test_without_a_label_the_mean_is_nan_and_the_sum_is_zero():
    hidden, weight, _ = make(4)
    none = torch.full((4,), -100)
    assert linear_cross_entropy(hidden, weight, none).isnan()
    loss, gradient = with_gradient(linear_cross_entropy, hidden, weight, none, reduction="sum")
    assert loss == 0 and not gradient.any()
    assert linear_cross_entropy(hidden[:0], weight, none[:0], reduction="sum") == 0


def test_tokens_without_a_label_are_not_read():
    hidden, weight, labels = make(30)
    expected = with_gradient(linear_cross_entropy, hidden, weight, labels)
    hidden[labels == -100] = torch.nan
    ours = with_gradient(linear_cross_entropy, hidden, weight, labels)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_large_logits_do_not_overflow():
    hidden, weight, labels = make(10)
    assert linear_cross_entropy(hidden * 1e4, weight, labels).isfinite()


def test_batches_of_sequences_and_strided_views():
    hidden, weight, labels = make(24)
    expected = linear_cross_entropy(hidden, weight, labels)
    shaped, targets = hidden.view(4, 6, 24), labels.view(4, 6)
    assert torch.equal(linear_cross_entropy(shaped, weight, targets), expected)
    strided = torch.stack((hidden, hidden), dim=-1)[..., 0]
    torch.testing.assert_close(linear_cross_entropy(strided, weight.T.contiguous().T, labels), expected)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden": torch.ones(3, 5)}, ["hidden", "(..., 4)", "(3, 5)"]),
        ({"hidden": torch.ones(3, 4, dtype=torch.int32)}, ["hidden", "int32"]),
        ({"weight": torch.ones(4)}, ["weight", "(V, D)", "(4,)"]),
        ({"weight": torch.ones(6, 4, requires_grad=True)}, ["weight", "gradient", "F.cross_entropy"]),
        ({"weight": FrozenWeight.of(torch.ones(6, 4), torch.ones(6))}, ["weight", "no bias"]),
        ({"labels": torch.tensor([0, 1])}, ["labels", "(3,)", "(2,)"]),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, ["labels", "int64", "float32"]),
        ({"labels": torch.tensor([0, 6, 1])}, ["labels", "[0, 6)", "6"]),
        ({"labels": torch.tensor([0, -1, 1])}, ["labels", "-100", "-1"]),
        ({"bias": torch.ones(5)}, ["bias", "(6,)", "(5,)"]),
        ({"cap": 0.0}, ["cap", "0.0"]),
        ({"scale": torch.inf}, ["scale", "inf"]),
        ({"reduction": "none"}, ["reduction", "'none'"]),
        ({"impl": "wings"}, ["impl='wings'"]),
    ],
)
def test_misuse(change, words):
    given = {"hidden": torch.ones(3, 4), "weight": torch.ones(6, 4), "labels": torch.tensor([0, 5, -100])}
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(**{**given, **change})
    for word in words:
        assert word in str(error.value)


def test_auto_takes_the_lean_one():
    assert ops.describe()["linear_cross_entropy"]["auto"] == "recompute"
