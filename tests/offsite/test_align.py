"""Alignment: the plugged model's last blocks come nearer to what the tuned emulator's give, and nothing else moves."""

import pytest
import torch

from tests.models import inputs_of
from tests.offsite.test_distil import deep
from tests.offsite.tuning import batches_of, spec_of, trainable, tune
from tlfast.offsite import Adapter, Distillation, Method, architecture, make, plug, save_adapter, tunable
from tlfast.offsite.distil import real_tokens, run_to
from tlfast.offsite.plugging import tuned_emulator
from tlfast.offsite.tuning import stages

FAMILIES = ("bert", "gpt2", "llama", "t5-encoder", "vit")


def sent(family, folder, recipe="keep:2", adapter=(1, 1), method=None):
    """A model, its bundle, and the adapter that was tuned on it."""
    model, method = deep(family), method or Method()
    bundle = make(model, adapter, recipe, folder / "bundle")
    tuned = tunable(bundle.model, bundle.blocks, spec_of(family), method)
    if method.name == "ladder":
        tuned.calibrate([inputs_of(family)])
    tune(tuned, trainable(tuned), batches_of(family))
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter", tuned, bundle, spec_of(family), method)
    return model, bundle


def settings_of(family, **changed):
    batches = [inputs_of(family, seed) for seed in range(4)]
    return Distillation(**{"batches": batches, "steps": 30, "learning_rate": 3e-3} | changed)


def mismatch(plugged, emulator, family):
    """The formula alone, at the end of the last block, on inputs that alignment did not see."""
    inputs = inputs_of(family, 11)
    with torch.no_grad():
        s, t = (
            real_tokens(
                run_to(model, len(architecture.find_blocks(model).blocks) - 1, inputs), inputs.get("attention_mask")
            )
            for model in (plugged, emulator)
        )
    return float(((t - s) / t.pow(2).mean().sqrt()).pow(2).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_blocks_come_nearer_and_nothing_else_moves(family, tmp_path):
    model, bundle = sent(family, tmp_path)
    plain = plug(model, tmp_path / "adapter")
    losses = []
    near = plug(
        model, tmp_path / "adapter", tmp_path / "out", tmp_path / "bundle",
        alignment=settings_of(family), progress=losses.append,
    )  # fmt: skip
    emulator = tuned_emulator(bundle, Adapter.open(tmp_path / "adapter"))
    assert len(losses) == 30 and not near.training
    assert mismatch(near, emulator, family) < 0.9 * mismatch(plain, emulator, family)
    before, after = plain.state_dict(), near.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    last = f"{architecture.blocks_path(near)}.5."
    assert moved and all(name.startswith(last) for name in moved)
    loaded = type(near).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], after[name]) for name in moved)
    compared = stages(model, bundle, Adapter.open(tmp_path / "adapter"), alignment=settings_of(family))["plug-in"]
    assert all(torch.equal(compared.state_dict()[name], after[name]) for name in after)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_first_loss_is_the_formula(family, tmp_path):
    model, bundle = sent(family, tmp_path)
    losses, batch = [], inputs_of(family, 11)
    settings = settings_of(family, batches=[batch], steps=1, kd_weight=7.0)
    plain = plug(model, tmp_path / "adapter")
    expected = 7 * mismatch(plain, tuned_emulator(bundle, Adapter.open(tmp_path / "adapter")), family)
    plug(model, tmp_path / "adapter", bundle=tmp_path / "bundle", alignment=settings, progress=losses.append)
    assert losses == [pytest.approx(expected, rel=1e-5)]


def test_where_the_emulator_is_the_model_there_is_nothing_to_mend(tmp_path):
    model, _ = sent("bert", tmp_path, "keep:all")
    plain = plug(model, tmp_path / "adapter").state_dict()
    aligned = plug(model, tmp_path / "adapter", bundle=tmp_path / "bundle", alignment=settings_of("bert")).state_dict()
    assert all(torch.equal(plain[name], aligned[name]) for name in plain)


def test_lora_is_aligned_after_it_is_merged(tmp_path):
    pytest.importorskip("peft")
    model, bundle = sent("bert", tmp_path, method=Method("lora"))
    emulator = tuned_emulator(bundle, Adapter.open(tmp_path / "adapter"))
    plain = plug(model, tmp_path / "adapter")
    near = plug(model, tmp_path / "adapter", bundle=tmp_path / "bundle", alignment=settings_of("bert"))
    assert mismatch(near, emulator, "bert") < 0.9 * mismatch(plain, emulator, "bert")


def test_refusals(tmp_path):
    for name, method, adapter in (
        ("ladder", Method("ladder", ladder={"reduction": 4}), (1, 1)),
        ("first", None, (2, 0)),
    ):
        (tmp_path / name).mkdir()
        model, _ = sent("bert", tmp_path / name, adapter=adapter, method=method)
        with pytest.raises(ValueError, match="has no last blocks to train"):
            plug(
                model, tmp_path / name / "adapter", tmp_path / "out", tmp_path / name / "bundle",
                alignment=settings_of("bert"),
            )  # fmt: skip
    with pytest.raises(ValueError, match="alignment: needs the emulator that was tuned"):
        plug(model, tmp_path / "first" / "adapter", tmp_path / "out", alignment=settings_of("bert"))
    (tmp_path / "both").mkdir()
    model, _ = sent("bert", tmp_path / "both")
    with pytest.raises(FloatingPointError, match="use a lower rate"):
        plug(
            model, tmp_path / "both" / "adapter", tmp_path / "out", tmp_path / "both" / "bundle",
            alignment=settings_of("bert", learning_rate=1e30),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
