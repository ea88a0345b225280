"""Distillation: a middle that comes nearer to the full one, and stays what it is."""

import pytest
import torch

from tests.models import inputs_of, tiny
from tlfast.offsite import Bundle, Distillation, architecture, make
from tlfast.offsite.distil import _output_of, run_to

STEPS = 40


def batches_of(family, count=4):
    return [inputs_of(family, seed) for seed in range(count)]


def deep(family, count=6):
    name = type(tiny(family).config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return tiny(family, **{name: count}, **({"layer_types": ["full_attention"] * count} if family == "qwen2" else {}))


def mismatch(model, bundle, family, seed=0):
    """mean(((t - s) / rms(t))^2) at the middle's end, over real tokens of one batch, by the formula alone."""
    inputs = inputs_of(family, seed)
    last = len(architecture.find_blocks(model).blocks) - 2
    with torch.no_grad(), _output_of(model, last) as full, _output_of(bundle.model, len(bundle.blocks.kept) - 2) as own:
        model(**inputs)
        bundle.model(**inputs)
    t, s = full[0], own[0]
    if "attention_mask" in inputs:
        t, s = (x[inputs["attention_mask"].bool()] for x in (t, s))
    return float(((t - s) / t.pow(2).mean().sqrt()).pow(2).mean())


@pytest.mark.parametrize("recipe", ["keep:2", "svd:12", "prune:0.5"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-encoder", "vit"])
def test_the_middle_comes_nearer_and_nothing_else_moves(family, recipe, tmp_path):
    model = deep(family)
    plain = make(model, (1, 1), recipe, tmp_path / "plain")
    settings = Distillation(batches_of(family), STEPS, 3e-3, lm_weight=0.0)
    losses = []
    near = make(model, (1, 1), recipe, tmp_path / "near", distillation=settings, progress=losses.append)
    assert len(losses) == STEPS
    assert mismatch(model, near, family) < 0.9 * mismatch(model, plain, family)
    assert near.manifest["emulator"]["distilled"]["steps"] == STEPS
    path = architecture.blocks_path(model)
    middle = tuple(f"{path}.{i}." for i in plain.blocks.middle_places)
    before, after = (architecture.tensors_of(bundle.model) for bundle in (plain, near))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith(middle) for name in moved)


def test_a_low_rank_middle_keeps_its_rank_and_is_sent_as_factors(tmp_path):
    model = deep("bert")
    make(model, (1, 1), "svd:5", tmp_path / "b", distillation=Distillation(batches_of("bert"), 5, 1e-3))
    bundle = Bundle.read(tmp_path / "b")
    for name in bundle.manifest["encodings"]:
        assert torch.linalg.matrix_rank(bundle.model.state_dict()[name], rtol=1e-5) == 5


def test_pruned_channels_stay_zero(tmp_path):
    model = deep("gpt2")
    plain = make(model, (1, 1), "prune:0.5", tmp_path / "a")
    near = make(model, (1, 1), "prune:0.5", tmp_path / "b", distillation=Distillation(batches_of("gpt2"), 5, 1e-3))
    for name, tensor in plain.model.state_dict().items():
        if name.endswith(("mlp.c_fc.weight", "mlp.c_proj.weight")) and ".h.0" not in name and ".h.5" not in name:
            assert torch.equal(tensor == 0, near.model.state_dict()[name] == 0)


def test_the_loss_is_the_papers(tmp_path):
    model = deep("gpt2")
    plain = make(model, (1, 1), "keep:2", tmp_path / "plain")
    batch = inputs_of("gpt2", 9)
    losses = []
    settings = Distillation([batch], 1, 1e-3, kd_weight=30.0, lm_weight=1.0)
    make(model, (1, 1), "keep:2", tmp_path / "b", distillation=settings, progress=losses.append)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        next_token = plain.model(**batch, labels=labels).loss
    assert losses[0] == pytest.approx(30 * mismatch(model, plain, "gpt2", 9) + float(next_token), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_the_full_model_isrun_to_the_end_of_its_middle_and_stays_as_it_was(family, tmp_path, monkeypatch):
    model = deep(family)
    last = architecture.find_blocks(model).blocks[-1]
    monkeypatch.setattr(last, "forward", lambda *_, **__: pytest.fail("it was run"))
    batch = inputs_of(family, 3)
    place = len(architecture.find_blocks(model).blocks) - 2
    with torch.no_grad():
        found = run_to(model, place, batch)
    monkeypatch.undo()
    with torch.no_grad(), _output_of(model, place) as expected:
        model(**batch)
    assert torch.equal(found, expected[0])
    assert not any(block._forward_hooks for block in architecture.find_blocks(model).blocks)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="int8 and nf4 weights cannot be trained"):
        make(deep("bert"), (1, 1), "int8", tmp_path / "b", distillation=Distillation(batches_of("bert"), 1))
    for settings, message in (
        ({"batches": []}, "batches: there is none"),
        ({"steps": 0}, "steps: 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan"),
        ({"kd_weight": 0}, "kd_weight: 0"),
        ({"lm_weight": -1}, "lm_weight: -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(**{"batches": [{}], **settings})
    with pytest.raises(FloatingPointError, match="use a lower rate"):
        make(deep("bert"), (1, 1), "keep:2", tmp_path / "b", distillation=Distillation(batches_of("bert"), 9, 1e30))
    assert not list(tmp_path.iterdir())
