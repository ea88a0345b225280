"""UniCL's, CLIP's and SigLIP's losses against the float64 formula, with hard inputs and bounded memory; errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import tlfast
from benchmarks.memory import peak_bytes
from tests.ops.interpreter import interpreted
from tlfast.bench.measure import hook_bytes
from tlfast.contrastive import UniCLLoss, clip_loss, siglip_loss, unicl_loss
from tlfast.contrastive.labels import group_by_label, group_means, group_sizes

from .cases import (
    IMPLS,
    LABELS,
    LEAN,
    NATIVE,
    TRITON,
    make,
    make_labels,
    needs_native,
    plain_clip,
    plain_siglip,
    plain_unicl,
    relative_error,
    results,
)

BAR = 2e-5  # of the norm of the loss and of each gradient
ROWS, WIDTHS, SCALES = (1, 2, 63, 64, 65, 1000), (16, 100, 512), (1.0, 14.3, 100.0)


def assert_accurate(ours, plain, inputs, dtype=torch.float32, bar=BAR):
    exact = results(plain, inputs, torch.float64)
    found = results(ours, inputs, dtype)
    for name, expected in exact.items():
        assert found[name].dtype == (dtype if name != "loss" else torch.promote_types(dtype, torch.float32)), name
        assert relative_error(found[name], expected) <= bar, name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("impl", ["recompute", NATIVE])
def test_unicl_accuracy(impl, rows, kind):
    labels = make_labels(kind, rows)
    for width, scale in itertools.product(WIDTHS, SCALES):
        inputs = (*make(rows, width), torch.tensor(scale))
        assert_accurate(
            lambda u, v, s: unicl_loss(u, v, labels, s, impl=impl), lambda u, v, s: plain_unicl(u, v, labels, s), inputs
        )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("rows, width", [(1, 16), (2, 100), (63, 16), (65, 100), (130, 33)])
@pytest.mark.parametrize("impl", ["reference", TRITON])
def test_unicl_accuracy_elsewhere(impl, rows, width, kind):
    labels = make_labels(kind, rows)
    inputs = (*make(rows, width), torch.tensor(100.0))
    assert_accurate(
        lambda u, v, s: unicl_loss(u, v, labels, s, impl=impl), lambda u, v, s: plain_unicl(u, v, labels, s), inputs
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spread", [None, 0.3, 0.05])
@pytest.mark.parametrize("impl", IMPLS)
def test_clip_accuracy(impl, spread):
    """With a small spread the loss is near 0: a difference of two scores near 100 must keep its digits."""
    for rows, width, scale in ((1, 16, 100.0), (2, 8, 30.0), (65, 100, 100.0), (130, 64, 14.3)):
        inputs = (*make(rows, width, spread=spread), torch.tensor(scale))
        assert_accurate(lambda u, v, s: clip_loss(u, v, s, impl=impl), plain_clip, inputs)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("spread", [None, 0.3])
@pytest.mark.parametrize("impl", IMPLS)
def test_siglip_accuracy(impl, spread):
    for rows, width, scale, bias in (
        (1, 16, 10.0, -10.0),
        (63, 100, 10.0, -10.0),
        (130, 33, 100.0, -30.0),
        (65, 64, 1.0, 5.0),
    ):
        inputs = (*make(rows, width, spread=spread), torch.tensor(scale), torch.tensor(bias))
        assert_accurate(lambda u, v, s, b: siglip_loss(u, v, s, b, impl=impl), plain_siglip, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["reference", "recompute", NATIVE])
def test_half_precision_is_multiplied_in_float32(impl, dtype):
    """The loss of rounded embeddings is that of float64 to float32's precision; gradients are rounded once."""
    labels = make_labels("mixed", 130)
    image, text = make(130, 100, dtype)
    scale = torch.tensor(100.0, requires_grad=True)
    exact = results(lambda u, v, s: plain_unicl(u, v, labels, s), (image, text, scale), torch.float64)
    leaves = image.requires_grad_(), text.requires_grad_()
    loss = unicl_loss(*leaves, labels, scale, impl=impl)
    dimage, dtext, dscale = torch.autograd.grad(loss, (*leaves, scale))
    assert loss.dtype == torch.float32 and dscale.dtype == torch.float32 and dimage.dtype == dtext.dtype == dtype
    assert relative_error(loss, exact["loss"]) <= BAR and relative_error(dscale, exact["dscale"]) <= BAR
    for found, name in ((dimage, "dimage"), (dtext, "dtext")):
        assert relative_error(found, exact[name]) <= torch.finfo(dtype).eps, name


@interpreted
def test_float16_weights_do_not_vanish_in_triton():
    """As in the mean over 100,000 pairs: most weights are below 1e-7, where float16 ends, and gradients are not."""
    image, text = make(130, 64, torch.float16)
    exact = results(lambda u, v: 1e-3 * plain_clip(u, v, torch.tensor(20.0)), (image, text), torch.float64)
    found = results(lambda u, v: 1e-3 * clip_loss(u, v, 20.0, impl="triton"), (image, text), torch.float16)
    for name in ("dimage", "dtext"):
        assert relative_error(found[name], exact[name]) <= torch.finfo(torch.float16).eps, name


@pytest.mark.parametrize("impl", ["recompute", NATIVE])
def test_many_tiles(impl, monkeypatch):
    from tlfast.ops.contrastive import native, recompute

    monkeypatch.setattr(native, "TILE", 48)
    monkeypatch.setattr(recompute, "MAP_ELEMENTS", 48 * 200)
    inputs = (*make(200, 20), torch.tensor(100.0))
    assert_accurate(lambda u, v, s: clip_loss(u, v, s, impl=impl), plain_clip, inputs)
    inputs += (torch.tensor(-10.0),)
    assert_accurate(lambda u, v, s, b: siglip_loss(u, v, s, b, impl=impl), plain_siglip, inputs)


@interpreted
def test_many_launches_and_parts_in_triton(monkeypatch):
    from tlfast.ops.contrastive import triton

    monkeypatch.setattr(triton, "_LAUNCH_BLOCKS", 1)
    monkeypatch.setattr(triton, "_WEIGHT_BYTES", 64 * 200 * 4)
    inputs = (*make(200, 20), torch.tensor(100.0))
    assert_accurate(lambda u, v, s: clip_loss(u, v, s, impl="triton"), plain_clip, inputs)
    inputs += (torch.tensor(-10.0),)
    assert_accurate(lambda u, v, s, b: siglip_loss(u, v, s, b, impl="triton"), plain_siglip, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl):
    image, text = (100 * x for x in make(33, 16))
    loss = clip_loss(image, text, 100.0, impl=impl)
    assert relative_error(loss, plain_clip(image.double(), text.double(), torch.tensor(100.0).double())) <= BAR


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_of_zero_and_numbers_for_tensors(impl):
    image, text = make(9, 16)
    assert clip_loss(image, text, 0.0, impl=impl) == pytest.approx(torch.tensor(9.0).log().item(), rel=1e-6)
    for scale in (torch.tensor(20.0), torch.tensor([20.0]), torch.tensor(20.0, dtype=torch.float64)):
        for ours in (
            clip_loss(image, text, scale, impl=impl),
            unicl_loss(image, text, torch.arange(9), scale, impl=impl),
        ):
            assert ours.shape == () and ours.dtype == torch.float32
            assert ours.item() == pytest.approx(clip_loss(image, text, 20.0, impl=impl).item(), rel=1e-6)
    assert siglip_loss(image, text, torch.tensor([10.0]), torch.tensor([-10.0]), impl=impl).shape == ()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl):
    wide = torch.randn(10, 80)
    image, text = wide[:, ::2][:, :16], torch.randn(16, 10).T
    dense = clip_loss(image.contiguous(), text.contiguous(), 5.0, impl=impl)
    assert clip_loss(image, text, 5.0, impl=impl).item() == pytest.approx(dense.item(), rel=1e-6)


@pytest.mark.parametrize("impl", LEAN)
@pytest.mark.parametrize("wanted", [("image",), ("text",), ("scale",), ("image", "scale"), ("bias",)], ids=str)
def test_only_the_gradients_that_are_wanted(impl, wanted):
    image, text = make(33, 20)
    leaves = {"image": image, "text": text, "scale": torch.tensor(10.0), "bias": torch.tensor(-10.0)}
    full = results(lambda *x: siglip_loss(*x, impl=impl), tuple(leaves.values()), torch.float32)
    for name in wanted:
        leaves[name].requires_grad_()
    siglip_loss(*leaves.values(), impl=impl).backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            assert relative_error(leaf.grad, full[f"d{name}"]) <= 1e-6


def test_group_numbers_and_means():
    labels = torch.tensor([5, -1, 2, 5, -1, 2, 2, 0])
    groups = group_by_label(labels)
    assert int(groups.min()) >= 0 and int(groups.max()) < len(labels)
    same = (labels[:, None] == labels) & (labels[:, None] >= 0) | torch.eye(8, dtype=torch.bool)
    assert torch.equal(groups[:, None] == groups, same)
    x = torch.randn(8, 3, dtype=torch.float64)
    sizes = group_sizes(groups)
    assert torch.equal(sizes, same.sum(1))
    expected = torch.where(sizes[:, None] > 1, same.double() @ x / sizes[:, None], 0)
    torch.testing.assert_close(group_means(x, groups, sizes), expected)
    assert group_by_label(torch.full((4,), 3)).unique().numel() == 1
    assert group_by_label(torch.full((4,), -1)).unique().numel() == 4


@needs_native
def test_kept_and_peak_memory():
    """Kept: a few numbers a row. Peak of a step beyond inputs and gradients: one tile, and what labels take, O(B D)."""
    rows, width = 4096, 64
    image, text = (x.requires_grad_() for x in make(rows, width))
    matrix, tile, embeddings = 4 * rows**2, 4 * 1024**2, 4 * rows * width
    assert hook_bytes(lambda: clip_loss(image, text, 20.0, impl="native")) <= 40 * rows

    def step(*labels):
        image.grad = text.grad = None
        (unicl_loss(image, text, *labels, 20.0) if labels else clip_loss(image, text, 20.0)).backward()

    assert peak_bytes(step) <= 2 * embeddings + tile + 100 * rows < matrix / 4
    labels = torch.arange(rows) // 3
    assert peak_bytes(lambda: step(labels)) <= (2 + 8) * embeddings + tile + 200 * rows < matrix / 2


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_into_one_graph(impl):
    labels = make_labels("own", 40)

    def step(image, text, scale, bias):
        loss = unicl_loss(image * 2, text, labels, scale, impl=impl) + clip_loss(image, text, scale, impl=impl)
        return loss + siglip_loss(image, text, scale, bias, impl=impl)

    inputs = (*make(40, 24), torch.tensor(10.0), torch.tensor(-10.0))
    compiled = results(torch.compile(step, fullgraph=True, backend="aot_eager"), inputs, torch.float32)
    for name, eager in results(step, inputs, torch.float32).items():
        torch.testing.assert_close(compiled[name], eager)


def test_autocast_keeps_the_products_wide():
    image, text = make(40, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clip_loss(image, text, 100.0)
        mixed = clip_loss(image.bfloat16(), text, 100.0)
    assert torch.equal(inside, clip_loss(image, text, 100.0))
    assert torch.equal(mixed, clip_loss(image.bfloat16().float(), text, 100.0))


def test_the_module_learns_its_scale():
    image, text = make(64, 32)
    labels = make_labels("mixed", 64)
    module = tlfast.nn.UniCLLoss()
    assert module is not None and isinstance(module, UniCLLoss)
    loss = module(3 * image, text / 7, labels)
    exact = plain_unicl(image.double(), text.double(), labels, torch.tensor(1 / 0.07).double())
    assert relative_error(loss, exact) <= BAR
    loss.backward()
    assert module.log_scale.grad is not None and module.log_scale.grad != 0
    assert module(image, text).item() == pytest.approx(clip_loss(image, text, 1 / 0.07).item(), rel=1e-5)
    with torch.no_grad():
        module.log_scale.fill_(9.0)
    module(image, text).backward()
    assert module.log_scale.exp().item() == pytest.approx(100.0) and module.log_scale.grad != 0


def test_training_brings_equal_labels_together():
    torch.manual_seed(0)
    labels = torch.arange(30) % 3
    image, text = (torch.randn(30, 8, requires_grad=True) for _ in range(2))
    module = UniCLLoss()
    optimizer = torch.optim.Adam([image, text, *module.parameters()], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        module(image, text, labels).backward()
        optimizer.step()
    nearest = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).argmax(1)
    assert torch.equal(labels[nearest], labels)


PAIR = {"image": torch.ones(3, 4), "text": torch.ones(3, 4), "labels": torch.arange(3), "logit_scale": 1.0}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"image": None}, ["image", "NoneType"]),
        ({"image": torch.ones(3, 4, dtype=torch.int64)}, ["image", "floating-point", "int64"]),
        ({"image": torch.ones(3)}, ["image", "(B, D)", "(3,)"]),
        ({"image": torch.ones(0, 4)}, ["image", "at least one row", "(0, 4)"]),
        ({"text": torch.ones(2, 4)}, ["text", "(3, 4)", "(2, 4)"]),
        ({"text": torch.ones(3, 5)}, ["text", "(3, 4)", "(3, 5)"]),
        ({"text": torch.ones(3, 4, device="meta")}, ["text", "meta", "cpu"]),
        (
            {"image": torch.tensor([[1.0], [torch.nan], [torch.inf]]).expand(3, 4)},
            ["image", "NaN", "2 of 3", "first 1"],
        ),
        ({"text": torch.full((3, 4), torch.inf)}, ["text", "NaN or infinity", "3 of 3"]),
        ({"labels": torch.ones(3)}, ["labels", "int64", "float32", "labels.long()"]),
        ({"labels": torch.ones(3, dtype=torch.int32)}, ["labels", "int64", "int32"]),
        ({"labels": [0, 1, 2]}, ["labels", "int64", "list", "torch.tensor(labels)"]),
        ({"labels": torch.arange(4)}, ["labels", "(3,)", "(4,)"]),
        ({"labels": torch.tensor([0, -2, 1])}, ["labels", "-1", "-2"]),
        ({"labels": torch.arange(3, device="meta")}, ["labels", "meta", "cpu"]),
        ({"logit_scale": -1.0}, ["scale", "negative", "-1.0", "logarithm"]),
        ({"logit_scale": torch.tensor(-0.5)}, ["scale", "negative", "-0.5"]),
        ({"logit_scale": float("nan")}, ["scale", "finite", "nan"]),
        ({"logit_scale": torch.ones(2)}, ["scale", "one element", "(2,)"]),
        ({"impl": "fast"}, ["impl='fast'", "native"]),
    ],
)
def test_misuse(change, words):
    with pytest.raises(ValueError) as error:
        unicl_loss(**{**PAIR, **change})
    for word in words:
        assert word in str(error.value)


def test_a_bias_must_be_finite():
    with pytest.raises(ValueError, match="bias must be finite, not inf"):
        siglip_loss(PAIR["image"], PAIR["text"], 1.0, float("inf"))


@pytest.mark.parametrize("scale, max_scale", [(0.0, 100.0), (200.0, 100.0), (1.0, float("inf"))])
def test_a_module_with_an_impossible_scale(scale, max_scale):
    with pytest.raises(ValueError, match="scale must be in"):
        UniCLLoss(scale, max_scale)
