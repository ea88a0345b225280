"""freeze(): what it returns, what it shares, and that the caller's model is never changed."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

import tlfast
from tests.models import CONFIGS, TEXT_ENCODERS, batch, digest, tiny
from tlfast.backbone import FrozenBackbone


@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_padding_is_zero(family):
    inputs = batch()
    output = tlfast.freeze(tiny(family))(**inputs)
    padding = ~inputs["attention_mask"].bool()
    for tensor in (output.embedding, *output.taps, output.last_hidden_state):
        assert padding.any() and not tensor[padding].any()


def test_without_a_mask_everything_equals_transformers():
    model, ids = tiny(), batch()["input_ids"]
    with torch.no_grad():
        theirs = model(input_ids=ids).last_hidden_state
    assert torch.equal(tlfast.freeze(model)(input_ids=ids).last_hidden_state, theirs)


def test_packed_is_the_padded_output_without_padding():
    backbone, inputs = tlfast.freeze(tiny()), batch((9, 5, 12))
    padded, packed = backbone(**inputs), backbone(**inputs, packed=True)
    valid = inputs["attention_mask"].bool()
    assert packed.cu_seqlens.tolist() == [0, 9, 14, 26] and packed.cu_seqlens.dtype == torch.int32
    assert torch.equal(packed.embedding, padded.embedding[valid])
    assert torch.equal(packed.last_hidden_state, padded.last_hidden_state[valid])
    assert all(torch.equal(a, b[valid]) for a, b in zip(packed.taps, padded.taps, strict=True))


def test_packed_without_a_mask_has_full_rows():
    packed = tlfast.freeze(tiny())(input_ids=batch((4, 4))["input_ids"], packed=True)
    assert packed.cu_seqlens.tolist() == [0, 4, 8] and packed.embedding.shape == (8, 48)


@pytest.mark.parametrize(("taps", "kept"), [("all", (0, 1, 2)), ([-1], (2,)), ([2, 0], (0, 2)), ([1, -2], (1,))])
def test_taps_may_be_indices(taps, kept):
    model, inputs = tiny(), batch()
    backbone = tlfast.freeze(model, taps=taps)
    everything = tlfast.freeze(model)(**inputs).taps
    assert backbone.tap_indices == kept
    assert all(torch.equal(a, everything[i]) for a, i in zip(backbone(**inputs).taps, kept, strict=True))


def test_forward_builds_no_graph_and_leaves_no_hook():
    model = tiny()
    backbone = tlfast.freeze(model)
    output = backbone(**batch())
    assert not any(t.requires_grad for t in (output.embedding, *output.taps, output.last_hidden_state))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_forward_leaves_no_hook():
    model = tiny()
    with pytest.raises(IndexError):
        tlfast.freeze(model)(input_ids=torch.full((1, 3), 10_000))
    assert not any(module._forward_hooks for module in model.modules())


def test_stays_in_eval_mode_even_if_the_caller_trains_the_shared_model():
    model, inputs = tiny(), batch()
    backbone = tlfast.freeze(model)
    expected = backbone(**inputs).last_hidden_state
    backbone.train()
    assert not model.training
    model.train()
    assert torch.equal(backbone(**inputs).last_hidden_state, expected)


def test_parameters_are_shared_frozen_and_unchanged():
    model = tiny()
    before = digest(model)
    backbone = tlfast.freeze(model)
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in backbone.parameters()} == shared
    assert not any(p.requires_grad for p in model.parameters())
    backbone(**batch())
    assert digest(model) == before


def test_a_task_head_is_not_run():
    model = AutoModelForSequenceClassification.from_config(CONFIGS["bert"]).eval()
    inputs = batch()
    backbone = tlfast.freeze(model)
    with torch.no_grad():
        expected = model.bert(**inputs).last_hidden_state
    valid = inputs["attention_mask"].bool()
    assert torch.equal(backbone(**inputs).last_hidden_state[valid], expected[valid])
    assert backbone.model is model.bert


def test_weight_bytes_counts_each_storage_once():
    model = tiny()
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert tlfast.freeze(model).weight_bytes() == sum(4 * p.numel() for p in model.parameters()) + buffers


def test_fingerprint_depends_on_the_weights_and_nothing_else():
    first, again, other = (tlfast.freeze(tiny(seed=seed)) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    changed = tiny(seed=0)
    with torch.no_grad():
        changed.encoder.layer[1].output.dense.weight[3, 4] += 1e-6
    assert tlfast.freeze(changed).fingerprint() != first.fingerprint()


def test_fingerprint_depends_on_what_the_weights_do_not_say():
    config = copy.deepcopy(CONFIGS["bert"])
    config.num_attention_heads = 6
    other = AutoModel.from_config(config)
    other.load_state_dict(tiny().state_dict())
    assert tlfast.freeze(other).fingerprint() != tlfast.freeze(tiny()).fingerprint()


def test_threads_share_a_backbone():
    backbone = tlfast.freeze(tiny())
    batches = [batch((9, 5, 12), seed=seed) for seed in range(4)]
    expected = [backbone(**inputs).taps for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for ours, theirs in zip(pool.map(lambda inputs: backbone(**inputs).taps, batches), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fully_masked_row_and_one_token():
    inputs = batch((6, 1))
    inputs["attention_mask"][0] = 0
    output = tlfast.freeze(tiny())(**inputs)
    assert not output.last_hidden_state[0].any() and output.last_hidden_state[1, 0].isfinite().all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_gives_empty_taps(shape, packed):
    ids = torch.zeros(shape, dtype=torch.long)
    output = tlfast.freeze(tiny())(input_ids=ids, attention_mask=ids, packed=packed)
    assert len(output.taps) == 3
    for tensor in (output.embedding, *output.taps, output.last_hidden_state):
        assert tensor.shape == ((0, 48) if packed else (*shape, 48))
    assert not packed or output.cu_seqlens.tolist() == [0] * (shape[0] + 1)


def misuse(**arguments):
    return lambda model: tlfast.freeze(model, **arguments)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (misuse(precision="fp7"), ValueError, ["precision", "fp7", "fp32"]),
        (misuse(taps=[3]), ValueError, ["taps", "3", "blocks 0 to 2"]),
        (misuse(taps=[-4]), ValueError, ["taps", "-4"]),
        (misuse(taps=[]), ValueError, ["taps", "empty"]),
        (misuse(taps="some"), ValueError, ["taps", "some", "all"]),
        (misuse(taps=[0.5]), ValueError, ["taps", "0.5"]),
        (misuse(taps=2), ValueError, ["taps", "2", "a list of block indices"]),
        (lambda model: tlfast.freeze(model)(**batch() | {"attention_mask": torch.ones(3, 4)}), ValueError, ["(3, 4)"]),
        (misuse(calibration=[{}]), ValueError, ["calibration"]),
        (lambda model: tlfast.freeze(model.bfloat16()), TypeError, ["bfloat16", "model.float()"]),
        (lambda model: tlfast.freeze(nn.Linear(2, 2)), ValueError, ["Linear", "bert", "distilbert"]),
        (lambda model: tlfast.freeze(tlfast.freeze(model)), TypeError, ["already frozen"]),
        (
            lambda model: tlfast.freeze(model)(**batch() | {"attention_mask": torch.ones(2, 1, 1, 2)}),
            ValueError,
            ["attention_mask", "(2, 1, 1, 2)"],
        ),
    ],
)
def test_misuse_is_a_clear_error(call, error, words):
    with pytest.raises(error) as caught:
        call(tiny())
    assert all(word in str(caught.value) for word in words)


def test_a_decoder_is_refused():
    model = BertModel(BertConfig(**{**CONFIGS["bert"].to_dict(), "is_decoder": True}))
    with pytest.raises(ValueError, match="is_decoder"):
        tlfast.freeze(model)


def test_repr_says_what_is_tapped():
    assert "taps=encoder.layer[2]" in repr(tlfast.freeze(tiny(), taps=[-1])) and isinstance(
        tlfast.freeze(tiny()), FrozenBackbone
    )


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5, dtype=torch.long)])
def test_packing_a_batch_without_padding_copies_nothing(mask):
    backbone, ids = tlfast.freeze(tiny()), torch.randint(3, 90, (2, 5))
    seen = []
    handle = backbone.blocks[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    packed = backbone(input_ids=ids, attention_mask=mask, packed=True)
    handle.remove()
    assert packed.cu_seqlens.tolist() == [0, 5, 10] and packed.taps[-1].shape == (10, 48)
    assert packed.taps[-1].data_ptr() == (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).data_ptr()


def test_its_repr_says_how_each_stack_runs_and_why():
    assert "precision=int8; encoder: 3 blocks over packed tokens, taps=encoder.layer[0, 1, 2]" in repr(
        tlfast.freeze(tiny(), "int8")
    )
    assert (
        "encoder: 3 blocks as modules (narrower than 256, where fp32 gives the model's own results to the last bit)"
        in repr(tlfast.freeze(tiny()))
    )
    line = tlfast.freeze(tiny("deberta-v2"), "bf16").extra_repr()
    assert "3 blocks as modules (its attention adds scores of queries and keys with relative positions)" in line
