"""The cross-entropy of a frozen head: what it returns and keeps, PyTorch's machinery, choice and refusals."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import peak_bytes
from tests.ops.cross_entropy_cases import SETTINGS, assert_accurate, make, plain, settings_of, with_gradient
from tests.ops.interpreter import interpreted
from tlfast import ops
from tlfast.bench.measure import saved_bytes
from tlfast.ops import FrozenWeight, linear_cross_entropy
from tlfast.ops.linear_cross_entropy import recompute
from tlfast.ops.linear_cross_entropy.autograd import kernels, loss_alone
from tlfast.ops.linear_cross_entropy.head import Head

# what runs here in which dtype: Triton's interpreter takes float32
RUNS = [
    ("recompute", torch.float32),
    ("recompute", torch.bfloat16),
    pytest.param("triton", torch.float32, marks=interpreted),
]
LEAN = ["recompute", pytest.param("triton", marks=interpreted)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tokens, rows", [(1, 1), (63, 5), (100, 100), (65, 64)])
def test_loss_and_gradient_err_as_plain_pytorch_does(tokens, rows, settings, dtype, monkeypatch):
    monkeypatch.setattr(recompute, "rows_at_once", lambda *sizes: rows)
    assert_accurate((tokens, 37, 24), dtype, settings, "recompute")


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tokens, rows", [(1, 1), (13, 5)])
def test_triton_errs_as_plain_pytorch_does(tokens, rows, settings, monkeypatch):
    monkeypatch.setattr(kernels("triton"), "rows_at_once", lambda *sizes: rows)
    assert_accurate((tokens, 37, 24), torch.float32, settings, "triton")


@pytest.mark.parametrize("impl", ["reference", "recompute"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradcheck(settings, impl):
    hidden, weight, labels = make(7, 5, 4, torch.float64)
    found = settings_of(settings, 5)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, labels, **found, impl=impl), (hidden,))


@pytest.mark.parametrize("impl", LEAN)
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_head_in_fewer_bits(precision, impl):
    hidden, weight, labels = make(33)
    stored = FrozenWeight.of(weight, precision=precision)
    loss, gradient = with_gradient(linear_cross_entropy, hidden, stored, labels, scale=0.5, impl=impl)
    expected = with_gradient(plain, hidden, stored.value(), labels, scale=0.5)
    assert abs(loss - expected[0]) <= 0.02 * expected[0]  # the product rounds hidden, too
    assert (gradient - expected[1]).norm() <= 0.05 * expected[1].norm()


@pytest.mark.parametrize("impl, dtype", RUNS)
@pytest.mark.parametrize("need_gradient", [True, False])
def test_opcheck(need_gradient, impl, dtype):
    hidden, weight, labels = make(9, dtype=dtype)
    dense = ("dense", *weight.shape, weight, None, None, None, torch.zeros(37), 0.5, 2.0)
    operator = torch.ops.tlfast.linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, labels, *dense, -100, need_gradient, impl))


@pytest.mark.parametrize("impl", LEAN)
def test_it_compiles_whole(impl):
    torch.compiler.reset()
    hidden, weight, labels = make(12)

    def step(hidden):
        return linear_cross_entropy(hidden * 2, weight, labels, cap=4.0, impl=impl)

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


@pytest.mark.parametrize("impl", LEAN)
def test_no_gradient_asked_for_keeps_nothing(impl):
    hidden, weight, labels = make(50)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, impl=impl)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, impl=impl).detach())


@pytest.mark.parametrize("impl", LEAN)
def test_without_a_label_the_mean_is_nan_and_the_sum_is_zero(impl):
    hidden, weight, _ = make(4)
    none = torch.full((4,), -100)
    assert linear_cross_entropy(hidden, weight, none, impl=impl).isnan()
    loss, gradient = with_gradient(linear_cross_entropy, hidden, weight, none, reduction="sum", impl=impl)
    assert loss == 0 and not gradient.any()
    loss, gradient = with_gradient(linear_cross_entropy, hidden[:0], weight, none[:0], reduction="sum", impl=impl)
    assert loss == 0 and gradient.shape == (0, 24)


@pytest.mark.parametrize("impl", LEAN)
def test_tokens_without_a_label_do_not_count(impl):
    hidden, weight, labels = make(30)
    expected = with_gradient(linear_cross_entropy, hidden, weight, labels, impl=impl)
    hidden[labels == -100] = torch.nan
    ours = with_gradient(linear_cross_entropy, hidden, weight, labels, impl=impl)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert not ours[1][labels == -100].any()


@pytest.mark.parametrize("impl", LEAN)
def test_large_logits_do_not_overflow(impl):
    hidden, weight, labels = make(10)
    loss, gradient = with_gradient(linear_cross_entropy, hidden * 1e4, weight, labels, impl=impl)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("impl", LEAN)
def test_what_is_not_a_number_is_seen(impl):
    for value in (torch.nan, torch.inf):
        hidden, weight, labels = make(10)
        hidden[4, 2] = value
        loss, gradient = with_gradient(linear_cross_entropy, hidden, weight, labels, impl=impl)
        assert loss.isnan() and gradient[4].isnan().all() and gradient[torch.arange(10) != 4].isfinite().all()


@pytest.mark.parametrize("impl", LEAN)
def test_words_that_cannot_be(impl):
    hidden, weight, labels = make(10)
    bias = torch.zeros(37)
    bias[1:30] = -torch.inf
    labels = torch.where(labels >= 0, labels % 7 + 30, labels)
    few = torch.cat((weight[:1], weight[30:]))
    expected = with_gradient(plain, hidden, few, torch.where(labels >= 0, labels - 29, labels))
    torch.testing.assert_close(with_gradient(linear_cross_entropy, hidden, weight, labels, bias, impl=impl), expected)


@pytest.mark.parametrize("impl", LEAN)
def test_batches_of_sequences_and_strided_views(impl):
    hidden, weight, labels = make(24)
    expected = linear_cross_entropy(hidden, weight, labels, impl=impl)
    shaped, targets = hidden.view(4, 6, 24), labels.view(4, 6)
    assert torch.equal(linear_cross_entropy(shaped, weight, targets, impl=impl), expected)
    strided, targets = (torch.stack((x, x), dim=-1)[..., 0] for x in (hidden, labels))
    ours = linear_cross_entropy(strided, weight.T.contiguous().T, targets, impl=impl)
    torch.testing.assert_close(ours, expected)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("settings", ["plain", "all"])
@pytest.mark.parametrize("vocabulary", [1, 16, 255, 256, 257, 4096, 5000, 8200])
def test_any_vocabulary_in_blocks(vocabulary, settings):
    assert_accurate((3, vocabulary, 8), torch.float32, settings, "triton")


@interpreted
def test_blocks_of_rows_that_begin_anywhere():
    hidden, weight, labels = make(5, 4999)
    stored = FrozenWeight.of(weight, precision="fp32")
    ours = with_gradient(linear_cross_entropy, hidden, stored, labels, cap=9.0, impl="triton")
    expected = with_gradient(linear_cross_entropy, hidden, stored, labels, cap=9.0, impl="recompute")
    torch.testing.assert_close(ours, expected)


@interpreted
@pytest.mark.parametrize("label", [-1, 37, 2**40, -(2**62)])
def test_a_label_outside_the_vocabulary_is_nan(label):
    hidden, weight, labels = make(10)
    labels[4] = label
    head = Head(weight, torch.linspace(-1, 1, 37), cap=4.0)  # below the checks, which a GPU's labels pass
    loss, gradient = kernels("triton").linear_cross_entropy(hidden, head, labels, -100, True)
    assert loss.isnan() and loss_alone(hidden, labels, head, -100, "triton").isnan()
    assert gradient[4].isnan().all() and gradient[torch.arange(10) != 4].isfinite().all()


@interpreted
@pytest.mark.parametrize(
    "tokens, width, vocabulary, expected",
    [(8192, 4096, 128256, 256), (1000, 4096, 128256, 128), (10, 64, 256000, 65), (4, 8, 2**25, 1), (4, 8, 100, 149760)],
)
def test_how_many_tokens_at_once(tokens, width, vocabulary, expected):
    rows = kernels("triton").rows_at_once(tokens, width, vocabulary)
    assert rows == expected
    assert rows == 1 or rows * vocabulary <= max(2**24, tokens * width)


@interpreted
@pytest.mark.parametrize(
    "dtype, words", [(torch.float64, "not torch.float64; use impl='recompute'"), (torch.bfloat16, "interpreter")]
)
def test_what_triton_cannot_take_is_refused(dtype, words):
    with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{words}"):
        linear_cross_entropy(*make(5, dtype=dtype), impl="triton")
    assert linear_cross_entropy(*make(5, dtype=dtype)).isfinite()


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
    expected = "triton" if torch.cuda.is_available() else "recompute"
    assert ops.describe()["linear_cross_entropy"]["auto"] == expected
