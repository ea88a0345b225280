"""The cross-entropy of a frozen head on a GPU: Triton against float64, memory of a part, and no waiting."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cross_entropy_cases import SETTINGS, assert_accurate, make, settings_of, with_gradient
from tlfast import ops
from tlfast.ops import FrozenWeight, linear_cross_entropy
from tlfast.ops.linear_cross_entropy.autograd import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

SIZES = [(1, 37, 24), (5, 1, 24), (63, 1000, 64), (65, 5001, 100), (300, 50257, 32), (129, 128256, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradient_err_as_plain_pytorch_does(sizes, settings, dtype):
    assert_accurate(sizes, dtype, settings, "triton", "cuda")


@pytest.mark.parametrize("tokens, rows", [(63, 5), (300, 128), (256, 128)])
def test_parts(tokens, rows, monkeypatch):
    monkeypatch.setattr(kernels("triton"), "rows_at_once", lambda *sizes: rows)
    assert_accurate((tokens, 1000, 64), torch.bfloat16, "all", "triton", "cuda")


@pytest.mark.parametrize("vocabulary", [1000, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_a_head_in_fewer_bits(precision, dtype, vocabulary):
    """What follows the product is the same whatever the product is."""
    hidden, weight, labels = make(100, vocabulary, 64, dtype, device="cuda")
    stored = FrozenWeight.of(weight.float() / 8, precision=precision)
    given = {"cap": 5.0, "bias": torch.linspace(-1, 1, vocabulary, device="cuda")}
    ours = with_gradient(linear_cross_entropy, hidden, stored, labels, **given, impl="triton")
    expected = with_gradient(linear_cross_entropy, hidden, stored, labels, **given, impl="recompute")
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=0)
    allowed = max(1e-6, 2 * torch.finfo(dtype).eps)  # of float32: what two exponentials and a quotient differ by
    assert (ours[1] - expected[1]).norm() <= allowed * expected[1].norm()


def test_offsets_beyond_32_bits(monkeypatch):
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    hidden, weight, labels = make(2100, 2**20, 16, torch.bfloat16, device="cuda")
    last = slice(2048, 2100)  # logits from 2^31 on
    expected = with_gradient(
        linear_cross_entropy, hidden[last], weight, labels[last], reduction="sum", impl="recompute"
    )
    others = labels.clone()
    others[: last.start] = -100
    monkeypatch.setattr(kernels("triton"), "rows_at_once", lambda *sizes: len(hidden))
    ours = with_gradient(linear_cross_entropy, hidden, weight, others, reduction="sum", impl="triton")
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-3, atol=0)
    assert not ours[1][: last.start].any()
    assert (ours[1][last] - expected[1]).norm() <= 0.02 * expected[1].norm()


@pytest.mark.parametrize("vocabulary, stride", [(50000, 50000), (50257, 50272)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_part_of_the_logits(dtype, vocabulary, stride):
    tokens, width = 2048, 64
    hidden, weight, labels = make(tokens, vocabulary, width, dtype, device="cuda")
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, impl="triton")  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
    small = 2**20
    assert torch.cuda.memory_allocated() - before <= hidden.nbytes + small
    part = kernels("triton").rows_at_once(tokens, width, vocabulary) * stride * dtype.itemsize
    assert part <= 2**24 * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before <= hidden.nbytes + part + small
    assert loss.isfinite()


def test_nothing_waits_for_the_gpu():
    hidden, weight, labels = make(300, 1000, 64, torch.bfloat16, device="cuda")
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, cap=5.0, impl="triton").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(hidden, weight, labels, cap=5.0, impl="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tokens_without_a_label_do_not_count():
    hidden, weight, labels = make(300, 5001, 64, torch.bfloat16, device="cuda")
    expected = with_gradient(linear_cross_entropy, hidden, weight, labels, impl="triton")
    hidden[labels == -100] = torch.nan
    ours = with_gradient(linear_cross_entropy, hidden, weight, labels, impl="triton")
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert not ours[1][labels == -100].any()


@pytest.mark.parametrize("label", [-1, 5001, 2**40])
def test_a_label_outside_the_vocabulary_is_nan(label):
    hidden, weight, labels = make(100, 5001, 64, torch.bfloat16, device="cuda")
    labels[40] = label
    loss, gradient = with_gradient(linear_cross_entropy, hidden, weight, labels, impl="triton")
    others = torch.arange(100, device="cuda") != 40
    assert loss.isnan() and gradient[40].isnan().all() and gradient[others].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_seen(value):
    hidden, weight, labels = make(100, 5001, 64, torch.bfloat16, device="cuda")
    hidden[40, 2] = value
    loss, gradient = with_gradient(linear_cross_entropy, hidden, weight, labels, impl="triton")
    others = torch.arange(100, device="cuda") != 40
    assert loss.isnan() and gradient[40].isnan().all() and gradient[others].isfinite().all()


def test_the_same_bits_every_time():
    inputs = make(300, 50257, 128, torch.bfloat16, device="cuda")
    first, second = (with_gradient(linear_cross_entropy, *inputs, impl="triton") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("need_gradient", [True, False])
def test_opcheck(need_gradient):
    hidden, weight, labels = make(9, dtype=torch.bfloat16, device="cuda")
    dense = ("dense", *weight.shape, weight, None, None, None, torch.zeros(37, device="cuda"), 0.5, 2.0)
    operator = torch.ops.tlfast.linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, labels, *dense, -100, need_gradient, "triton"))


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_compiles_into_one_graph(impl):
    torch.compiler.reset()
    hidden, weight, labels = make(50, 1000, 64, torch.bfloat16, device="cuda")
    given = settings_of("all", 1000, "cuda")

    def step(hidden):
        return linear_cross_entropy(hidden * 2, weight, labels, **given, impl=impl)

    ours = with_gradient(torch.compile(step, fullgraph=True), hidden)
    torch.testing.assert_close(ours, with_gradient(step, hidden))


def test_auto_takes_triton_and_passes_it_over_for_float64():
    assert ops.describe()["linear_cross_entropy"]["auto"] == "triton"
    hidden, weight, labels = make(50, device="cuda")
    expected = linear_cross_entropy(hidden, weight, labels, impl="triton")
    assert torch.equal(linear_cross_entropy(hidden, weight, labels), expected)
    assert linear_cross_entropy(hidden.double(), weight.double(), labels).dtype == torch.float64
