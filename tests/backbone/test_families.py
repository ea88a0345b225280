"""Every family: taps, embedding, last hidden state and logits are the model's own to the last bit."""

import pytest
import torch

import tlfast
from tests.models import CONFIGS, DECODERS, ENCODER_DECODERS, IMAGE_ENCODERS, inputs_of, tiny
from tlfast.backbone.families import SUPPORTED

LANGUAGE_MODELS = DECODERS | ENCODER_DECODERS


def by_stack(backbone, output):
    """The output of each stack, by its name."""
    return {"encoder": output.encoder, "decoder": output.decoder} if backbone.is_encoder_decoder else {"": output}


def hidden_states(theirs, name):
    return theirs.hidden_states if not name else getattr(theirs, f"{name}_hidden_states")


def tokens(name, inputs):
    """Which of a stack's positions are tokens; all where it has no mask."""
    mask = inputs.get("attention_mask")
    return slice(None) if mask is None or name == "decoder" else mask.bool()


def plainly_hooked(model, blocks, inputs):
    """What the model itself gives, and what hooks of our own saw leave its blocks."""
    seen = {}

    def keep(index):
        def hook(_module, _args, output):
            seen[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [block.register_forward_hook(keep(index)) for index, block in enumerate(blocks)]
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return theirs, seen


def test_a_model_of_every_kind_is_here():
    assert {config.model_type for config in CONFIGS.values()} == set(SUPPORTED)


@pytest.mark.parametrize("family", CONFIGS)
def test_taps_equal_the_blocks_outputs_to_the_last_bit(family):
    model, inputs = tiny(family), inputs_of(family)
    backbone = tlfast.freeze(model)
    for (name, ours), stack in zip(
        by_stack(backbone, backbone(**inputs)).items(), backbone.stacks.values(), strict=True
    ):
        theirs, seen = plainly_hooked(model, stack.blocks, inputs)
        hidden, valid = hidden_states(theirs, name), tokens(name, inputs)
        assert len(ours.taps) == len(seen) == len(hidden) - 1 > 1
        assert torch.equal(ours.embedding[valid], hidden[0][valid])
        for index, tap in enumerate(ours.taps):
            assert torch.equal(tap[valid], seen[index][valid])
        for tap, theirs_ in zip(ours.taps[:-1], hidden[1:-1], strict=True):  # the last one may be normed there
            assert torch.equal(tap[valid], theirs_[valid])


@pytest.mark.parametrize("family", CONFIGS)
def test_the_last_hidden_state_is_the_models_own(family):
    model, inputs = tiny(family), inputs_of(family)
    backbone = tlfast.freeze(model)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        theirs = backbone.base(**inputs) if not backbone.is_encoder_decoder else _halves(model, inputs)
    for name, ours in by_stack(backbone, backbone(**inputs)).items():
        expected = theirs[name] if name else theirs.last_hidden_state
        valid = tokens(name, inputs)
        assert ours.last_hidden_state.shape == expected.shape
        assert torch.equal(ours.last_hidden_state[valid], expected[valid])
        assert not ours.last_hidden_state.requires_grad


def _halves(model, inputs):
    encoder_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    memory = model.get_encoder()(**encoder_inputs).last_hidden_state
    decoder = model.get_decoder()(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=memory,
        encoder_attention_mask=inputs["attention_mask"],
    )
    return {"encoder": memory, "decoder": decoder.last_hidden_state}


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_logits_of_the_frozen_head_equal_the_models_own(family):
    model, inputs = tiny(family), inputs_of(family)
    backbone = tlfast.freeze(model)
    with torch.no_grad():
        theirs = model(**inputs).logits
        (*_, ours) = by_stack(backbone, backbone(**inputs)).items()
    valid = tokens(ours[0], inputs)
    logits = backbone.lm_head(ours[1].last_hidden_state)
    assert torch.equal(logits[valid], theirs[valid])
    assert backbone.lm_head.width == ours[1].last_hidden_state.shape[-1] == backbone.output_width


@pytest.mark.parametrize("family", [name for name in CONFIGS if name not in IMAGE_ENCODERS])
def test_packed_is_padded_without_padding(family):
    backbone, inputs = tlfast.freeze(tiny(family)), inputs_of(family)
    padded, packed = (by_stack(backbone, backbone(**inputs, packed=packed)) for packed in (False, True))
    for name, ours in packed.items():
        mask = inputs["attention_mask"].bool() if name != "decoder" else torch.ones(3, 7, dtype=torch.bool)
        assert ours.cu_seqlens.diff().tolist() == mask.sum(1).tolist()
        assert torch.equal(ours.last_hidden_state, padded[name].last_hidden_state[mask])
        assert all(torch.equal(tap, whole[mask]) for tap, whole in zip(ours.taps, padded[name].taps, strict=True))


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_decoders_padding_is_zero_and_changes_nothing(family):
    backbone, inputs = tlfast.freeze(tiny(family)), inputs_of(family)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    whole = backbone(**inputs).decoder
    ours = backbone(**inputs, decoder_attention_mask=mask).decoder
    assert not ours.last_hidden_state[1, 4:].any() and not ours.taps[0][1, 4:].any()
    torch.testing.assert_close(ours.last_hidden_state[1, :4], whole.last_hidden_state[1, :4])


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("t5-v1.1", {"gated": True, "positions": "relative", "norm": "rms", "scale": 1.0, "buckets": 8}),
        ("opt-projected", {"placement": "post", "activation": "relu"}),
        ("llama", {"heads": 4, "kv_heads": 2, "head_dim": 16, "positions": "rotary", "bias": False}),
        ("qwen2", {"qkv_bias": True, "bias": False, "qk_norm": False}),
        ("qwen3", {"qkv_bias": False, "qk_norm": True}),
        ("gemma2", {"placement": "sandwich", "scale": 12**-0.5, "activation": "gelu_pytorch_tanh"}),
        ("gpt2", {"hidden": 96, "causal": True, "activation": "gelu_new"}),
        ("bart", {"heads": 6, "head_dim": 8, "hidden": 48, "cross": True, "causal": True, "placement": "post"}),
        ("clip-text", {"causal": True, "placement": "pre", "activation": "quick_gelu"}),
        ("siglip-text", {"causal": False}),
        ("modernbert", {"gated": True, "positions": "rotary", "norm": "layer"}),
    ],
)
def test_what_is_read_of_a_block(family, shape):
    spec = tlfast.freeze(tiny(family)).block_spec
    assert {name: getattr(spec, name) for name in shape} == shape


def test_an_encoder_decoder_has_both_stacks():
    backbone = tlfast.freeze(tiny("bart"), taps=[-1])
    assert backbone.is_encoder_decoder and not tlfast.freeze(tiny("t5-encoder")).is_encoder_decoder
    assert {name: stack.taps for name, stack in backbone.stacks.items()} == {"encoder": (2,), "decoder": (1,)}
    assert (backbone.stacks["encoder"].spec.hidden, backbone.stacks["decoder"].spec.hidden) == (96, 48)
    tapped = backbone.with_taps([0], encoder=[0, 1])
    assert (tapped.stacks["encoder"].taps, tapped.tap_indices) == ((0, 1), (0,))
    assert backbone.tap_indices == (1,), "with_taps makes another one"
