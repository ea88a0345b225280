"""A side network with products in bfloat16: what autocast makes of it, and all that a ladder does goes with it."""

from __future__ import annotations

import pytest
import torch

import tlfast
from tests.ladder.test_tap_storage import gradients, ladder
from tests.models import batch, examples_of


def error(found, exact):
    return {name: float((found[name] - gradient).norm()) for name, gradient in exact.items()}


def assert_errs_no_more(ours, theirs, exact):
    # a scalar gate's gradient is a sum over all tokens and channels that nearly cancels: the largest is their measure
    of_gates = 0.1 * max(float(gradient.abs()) for name, gradient in exact.items() if name.endswith("alpha"))
    for name, gradient in exact.items():
        rounding = of_gates if name.endswith("alpha") else 1e-2 * float(gradient.norm())
        assert ours[name] <= 1.5 * theirs[name] + rounding, name


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_its_gradients_err_as_those_of_the_whole_ladder_under_autocast(family):
    inputs = examples_of(family)
    exact = gradients(ladder("keep", family), inputs)
    ours = error(gradients(ladder("keep", family, side_precision="bf16"), inputs), exact)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = error(gradients(ladder("keep", family), inputs), exact)
    assert_errs_no_more(ours, theirs, exact)
    assert any(ours.values())


def test_backbone_weights_and_gradients_stay_in_float32():
    model, plain = ladder("keep", side_precision="bf16"), ladder("keep")
    inputs = examples_of("bert")
    found = gradients(model, inputs)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.side.parameters()} == {torch.float32}
    ours, theirs = (m.look(**inputs) for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours.taps, theirs.taps, strict=True))
    assert model(**inputs).logits.dtype == torch.float32


def test_taps_are_kept_in_bfloat16():
    model, inputs, kept = ladder("keep", reduction=4, side_precision="bf16"), examples_of("bert"), []
    tap = model.look(**inputs).taps[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**inputs)
    found = {t.dtype for t in kept if t.numel() == tap.numel() and t.shape[-1] == tap.shape[-1]}
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("storage", ["int8", "stream"])
def test_every_storage_errs_as_keep_does(storage):
    inputs = examples_of("bert")
    exact = gradients(ladder("keep"), inputs)
    ours, theirs = (error(gradients(ladder(kind, side_precision="bf16"), inputs), exact) for kind in (storage, "keep"))
    assert_errs_no_more(ours, theirs, exact)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_it_trains_on_every_backbone(precision):
    model = ladder("keep", precision=precision, side_precision="bf16")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = model(**examples_of("bert")).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_it_generates_with_a_cache():
    model = ladder("keep", "gpt2", side_precision="bf16").eval()
    ids = batch((6, 6))["input_ids"]
    assert model.generate(ids, max_new_tokens=4, use_cache=True, do_sample=False).shape == (2, 10)


def test_a_folder_and_a_bank_keep_it(tmp_path):
    model, inputs = ladder("keep", side_precision="bf16").eval(), batch()
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = tlfast.LadderModel.from_pretrained(tmp_path, model.backbone)
    assert again.ladder_config.side_precision == "bf16"
    bank = tlfast.LadderBank({"one": again, "two": model}, model.backbone)
    given = bank(**inputs)
    assert all(torch.equal(given[name].logits, logits) for name in ("one", "two"))


def test_misuse_is_a_clear_error():
    with pytest.raises(ValueError, match="side_precision: 'fp16' is not available; allowed: 'fp32', 'bf16'"):
        tlfast.LadderConfig(side_precision="fp16")
