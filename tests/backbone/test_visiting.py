"""Taps handed on as they come are the taps that one gets all together."""

import pytest
import torch

import tlfast
from tests.budget import FACTOR
from tests.models import CONFIGS, ENCODER_DECODERS, batch, inputs_of, tiny


def both_ways(backbone, inputs):
    """For each stack its output, what was visited, and the output of that call."""
    if not backbone.is_encoder_decoder:
        seen = []
        yield backbone(**inputs), seen, backbone(**inputs, visit=seen.append)
        return
    decoder_inputs = {name: inputs.pop(name) for name in list(inputs) if name.startswith("decoder_")}
    for_encoder, for_decoder = [], []
    encoder = backbone.encode(**inputs)
    yield encoder, for_encoder, backbone.encode(**inputs, visit=for_encoder.append)
    places = encoder.last_hidden_state, inputs.get("attention_mask")
    decoder = backbone.decode(*places, **decoder_inputs)
    yield decoder, for_decoder, backbone.decode(*places, **decoder_inputs, visit=for_decoder.append)


def distance(taps, others):
    return sum(float((tap.double() - other.double()).square().sum()) for tap, other in zip(taps, others, strict=True))


def assert_visited(precise, backbone, inputs):
    """The same bits; of pre-norm blocks in fewer bits no farther from float32 than the taps of the usual call.

    A norm then reads the sum before it as it was handed on, in 16 bits, where the usual call has it in 32.
    """
    exact = list(both_ways(precise, dict(inputs)))
    for (of_precise, _, _), (whole, seen, rest) in zip(exact, both_ways(backbone, dict(inputs)), strict=True):
        assert rest.taps == () and not any(tap.requires_grad for tap in seen)
        usual = (whole.embedding, *whole.taps, whole.last_hidden_state)
        visited = (*seen, rest.last_hidden_state)
        if backbone.precision == "fp32" or backbone.block_spec.placement == "post":
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(visited, usual, strict=True))
        else:
            reference = (of_precise.embedding, *of_precise.taps, of_precise.last_hidden_state)
            assert distance(visited, reference) <= FACTOR * distance(usual, reference)


@pytest.mark.parametrize(("precision", "layers"), [("fp32", "all"), ("bf16", [1])])
@pytest.mark.parametrize("family", CONFIGS)
def test_visited_taps_are_the_taps(family, layers, precision):
    backbone = tlfast.freeze(tiny(family), precision, taps=layers)
    assert_visited(tlfast.freeze(tiny(family), taps=layers), backbone, inputs_of(family))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5-encoder", "llama"])
@pytest.mark.parametrize("layers", ["all", [0]])
def test_packed_blocks_in_pieces(family, layers, precision):
    """Wide enough for the packed path, whose blocks run in one native call, or in one between two taps."""
    wide = {"bert": {"hidden_size": 256, "num_attention_heads": 4}, "gpt2": {"n_embd": 256, "n_head": 4}}
    wide |= {"t5-encoder": {"d_model": 256, "d_kv": 64, "num_heads": 4}}
    wide |= {"llama": {"hidden_size": 256, "head_dim": 64}}
    backbone = tlfast.freeze(tiny(family, **wide[family]), precision, taps=layers)
    assert_visited(tlfast.freeze(tiny(family, **wide[family]), taps=layers), backbone, batch())


def test_what_is_at_padding_does_not_reach_the_model():
    """A model that reads what stands at padding goes on with its own numbers, not with the visitor's zeros."""
    backbone, inputs = tlfast.freeze(tiny()), batch()
    before = [
        layer_output.clone() for layer_output in backbone.model(**inputs, output_hidden_states=True).hidden_states
    ]
    handles, states = [], []
    for block in backbone.blocks:
        handles.append(block.register_forward_hook(lambda _m, _a, out: states.append(out.clone())))
    backbone(**inputs, visit=lambda tap: tap.add_(0))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, before[1:], strict=True))


def test_an_empty_batch_is_visited_too():
    seen = []
    ids = torch.zeros(0, 4, dtype=torch.long)
    output = tlfast.freeze(tiny())(input_ids=ids, attention_mask=ids, visit=seen.append)
    assert [tuple(tap.shape) for tap in seen] == 4 * [(0, 4, 48)] and output.taps == ()


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_of_an_encoder_decoder_each_half_is_visited(family):
    with pytest.raises(ValueError, match=r"visit: .* pass one to encode and one to decode"):
        tlfast.freeze(tiny(family))(**inputs_of(family), visit=print)
