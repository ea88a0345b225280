"""A ladder on every family: its blocks are the backbone's own type, it trains, and it comes back from a folder."""

import pytest
import torch

import tlfast
from tests.models import (
    BERT_LIKE,
    CONFIGS,
    DECODERS,
    ENCODER_DECODERS,
    WITHOUT_AUTO,
    digest,
    examples_of,
    inputs_of,
    task_of,
    tiny,
)
from tlfast import LadderConfig, LadderModel
from tlfast.ladder.attention import rotation_of

LANGUAGE_MODELS = DECODERS | ENCODER_DECODERS
# what a side block has no counterpart of, switched off: disentangled attention, and the cap of attention scores
WITHOUT = {
    "deberta-v2": {"relative_attention": False, "pos_att_type": []},
    "gemma2": {"attn_logit_softcapping": None},
}
# blocks that norm what they give, and a model that norms its first token alone
WITHOUT_FINAL_NORM = {*BERT_LIKE, "bart", "opt-projected", "clip-vision"}
ANOTHER_TYPE = {("modernbert", 0)}  # a block whose first norm is an identity


def ladder(family, **settings):
    torch.manual_seed(0)
    return LadderModel(tlfast.freeze(tiny(family)), task_of(family), 3, LadderConfig(**{"reduction": 2, **settings}))


def move(model):
    """Move every trained weight, so that none of them is zero or one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def calls_of(blocks, run):
    """The arguments and the output of every block while `run` runs a transformers model."""
    calls = {}

    def keep(index):
        def hook(_module, args, kwargs, output):
            calls[index] = (args, kwargs, output)

        return hook

    handles = [block.register_forward_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
    run()
    for handle in handles:
        handle.remove()
    return calls


def called(block, args, kwargs, x):
    """A transformers block once more, on other hidden states."""
    output = block(x, *args[1:], **kwargs) if args else block(**kwargs | {"hidden_states": x})
    return output[0] if isinstance(output, tuple) else output


def side_inputs(side, index, length):
    """The position bias or rotation that side block `index` reads."""
    frequencies = side._frequency_names[index]
    positions = torch.arange(length)[None]
    return {
        "bias": None if side.relative_bias is None else side.relative_bias(length),
        "rotation": None
        if frequencies is None
        else rotation_of(getattr(side, frequencies), positions, side.rotary_scaling),
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_pruning_to_full_width_gives_the_backbones_own_blocks(family):
    """With nothing to prune, side block i must be backbone block i, in output and gradient: this pins every slice,
    transpose, norm and rotation against transformers' own code."""
    inputs, backbone = inputs_of(family), tlfast.freeze(tiny(family, **WITHOUT.get(family, {})))
    model = LadderModel(backbone, task_of(family), 3, LadderConfig(reduction=1), calibration=[inputs]).eval()
    sides = [model.side] if model.side_encoder is None else [model.side_encoder, model.side]
    mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    for side, stack in zip(sides, backbone.stacks.values(), strict=True):
        calls = calls_of(stack.blocks, lambda: backbone(**inputs))
        others = {"key_mask": mask}
        if stack.spec.cross:
            memory = backbone.encode(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            others = {"memory": memory.last_hidden_state, "memory_mask": mask}
        assert len(side.blocks) == len(stack.blocks) == len(calls)
        for index, block in enumerate(side.blocks):
            if (family, index) in ANOTHER_TYPE:
                continue
            args, kwargs, _ = calls[index]
            x = (args[0] if args else kwargs["hidden_states"]).clone().requires_grad_()
            theirs = called(stack.blocks[index], args, kwargs, x)
            ours = block(x, **others, **side_inputs(side, index, x.shape[1]))
            valid = others.get("key_mask")
            valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
            assert_near(ours[valid], theirs[valid])
            upstream = torch.randn_like(x) * valid[..., None]
            assert_near(*(torch.autograd.grad(y, x, upstream)[0][valid] for y in (ours, theirs)))


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in WITHOUT_FINAL_NORM])
def test_pruning_to_full_width_gives_the_backbones_own_final_norm(family):
    inputs = inputs_of(family)
    model = ladder(family, reduction=1)
    model.calibrate([inputs])
    output = model.backbone(**inputs)
    sides = [(model.side, output)]
    if model.side_encoder is not None:
        sides = [(model.side_encoder, output.encoder), (model.side, output.decoder)]
    for side, of_stack in sides:
        valid = of_stack.last_hidden_state.any(-1)
        assert_near(side.norm(of_stack.taps[-1])[valid], of_stack.last_hidden_state[valid])


def assert_near(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("family", CONFIGS)
def test_training_moves_every_weight_of_the_ladder_and_none_of_the_backbone(family):
    model, batch = ladder(family, dropout=0.0).train(), examples_of(family)
    before = digest(model.backbone.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("backbone") for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    losses = []
    for step in range(4):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained.keys()
        if step or family not in LANGUAGE_MODELS:  # below a W_up of zero there is no gradient at first
            assert not [name for name, p in trained.items() if not p.grad.any()]
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert digest(model.backbone.model) == before


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_new_ladder_gives_the_language_models_own_logits_and_loss(family):
    model, batch = ladder(family).eval(), examples_of(family)
    with torch.no_grad():
        theirs = model.backbone.model(**batch)
    ours = model(**batch)
    valid = slice(None) if family in ENCODER_DECODERS else batch["attention_mask"].bool()
    assert torch.equal(ours.logits[valid], theirs.logits[valid])
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_without_the_blend_only_the_ladder_speaks(family):
    model, batch = ladder(family, blend=False, dropout=0.0).train(), examples_of(family)
    result = model(**batch)
    with torch.no_grad():
        theirs = model.backbone.model(**batch)
    assert not torch.allclose(result.logits, theirs.logits, rtol=0.01, atol=0.01)
    result.loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_reloaded_ladder_gives_equal_logits(family, tmp_path):
    batch = examples_of(family)
    model = ladder(family, layers=[0, -1])
    model.calibrate([batch])
    move(model)
    logits = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "ladder")
    backbones = [tiny(family), tlfast.freeze(tiny(family))]
    if family not in WITHOUT_AUTO:  # by its folder, transformers' AutoModel loads it
        tiny(family).save_pretrained(tmp_path / "backbone")
        backbones.append(tmp_path / "backbone")
    for backbone in backbones:
        again = LadderModel.from_pretrained(tmp_path / "ladder", backbone)
        assert torch.equal(again(**batch).logits, logits) and not again.training
    with pytest.raises(ValueError, match="not those the ladder"):
        LadderModel.from_pretrained(tmp_path / "ladder", tiny(family, seed=1))


@pytest.mark.parametrize("family", ["modernbert", "llama", "qwen3", "gemma2", "t5", "bart", "dinov2"])
@pytest.mark.parametrize("init", ["prune", "pca"])
def test_starting_weights_do_not_depend_on_how_batches_are_cut(family, init):
    whole = examples_of(family)
    rows = [{name: tensor[i : i + 1] for name, tensor in whole.items()} for i in range(3)]
    together, apart = ladder(family, init=init), ladder(family, init=init)
    together.calibrate([whole])
    apart.calibrate(rows)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", CONFIGS)
def test_autocast_trains_and_answers(family):
    """Under autocast norms and rotations give float32 and products bfloat16: no operation may mix the two."""
    model, inputs = ladder(family, init="random"), examples_of(family)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**inputs).loss
        loss.backward()
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
    assert loss.isfinite() and logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
