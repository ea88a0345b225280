"""All blocks in one native call against the same operations one by one, to the last bit."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import tlfast
from tests.models import inputs_of, tiny
from tests.ops.norm_cases import needs_native
from tlfast.backbone.packed import Batch, PackedStack
from tlfast.ops.packed_blocks import Table, packed_blocks, why_not

AT_ONCE = ["bert", "gpt2", "llama", "mistral", "opt", "t5-encoder", "vit", "clip-vision", "clip-text", "dinov2"]
ONE_BY_ONE = ["qwen3"]
PRECISIONS = ("bf16", "int8", "nf4")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def stack_of(family, precision="bf16"):
    backbone = tlfast.freeze(tiny(family), precision=precision)
    return PackedStack(backbone.stack, backbone.model_type), backbone


def sequences_of(backbone, lengths):
    """Packed sequences as a batch of the model's gives them, and their first hidden states."""
    spec, longest = backbone.stack.spec, max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    inputs = {}
    if spec.positions == "rotary":
        angles = torch.rand(1, longest, spec.head_dim)
        inputs["position_embeddings"] = angles.cos(), angles.sin()
    batch = Batch.of(backbone.stack, (len(lengths), longest), mask, inputs)
    return torch.randn(sum(lengths), spec.width).bfloat16(), batch.sequences


@needs_native
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", AT_ONCE)
def test_equal_to_the_operations_one_by_one(family, precision):
    stack, backbone = stack_of(family, precision)
    x, sequences = sequences_of(backbone, [7, 3, 12, 1, 0, 9, 16, 5, 11, 8, 2, 14] * 3)
    count = len(stack.blocks)
    assert why_not(x, stack.table, sequences.offsets.host) is None
    for taps in (tuple(range(count)), (0,), (count - 1,), (), (count - 1, 0, 0)):
        taken, last = stack.run(x, sequences, taps)
        expected, expected_last = stack.run_one_by_one(x, sequences, taps)
        assert len(taken) == len(taps)
        for ours, theirs in zip((*taken, last), (*expected, expected_last), strict=True):
            assert torch.equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("lengths", [[5] * 64, [40, 2, 2]])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same(threads, lengths):
    stack, backbone = stack_of("bert")
    x, sequences = sequences_of(backbone, lengths)
    expected, _ = stack.run_one_by_one(x, sequences, (0, 1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        taken, _ = stack.run(x, sequences, (0, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(taken, expected, strict=True))


@needs_native
def test_what_stays_one_by_one():
    for family in ONE_BY_ONE:
        assert stack_of(family)[0].table is None
    stack, backbone = stack_of("bert")
    x, sequences = sequences_of(backbone, [40, 2, 2])
    table, offsets = stack.table, sequences.offsets.host
    assert why_not(x, table, offsets) is None
    assert "float32" in why_not(x.float(), table, offsets)
    assert "must rise from 0 to the 44 tokens" in why_not(x, table, offsets.flip(0))
    with pytest.raises(RuntimeError, match=r"packed_blocks cannot run: .* run the operations one by one"):
        packed_blocks(x.float(), table, offsets, (0,))


@needs_native
@pytest.mark.parametrize("family", ["bert", "t5-encoder", "mistral"])
def test_long_sequences_windows_and_biases(family):
    stack, backbone = stack_of(family)
    x, sequences = sequences_of(backbone, [300, 1, 65, 0, 290] * 3)
    if family == "mistral":
        stack.blocks = [replace(block, window=20) for block in stack.blocks]
        stack.table = stack._at_once()
    assert (sequences.bias is not None) == (family == "t5-encoder")
    (ours,), last = stack.run(x, sequences, (0,))
    (theirs,), expected = stack.run_one_by_one(x, sequences, (0,))
    assert torch.equal(ours, theirs) and torch.equal(last, expected)


@needs_native
def test_a_copy_reads_its_own_weights():
    stack, backbone = stack_of("bert")
    x, sequences = sequences_of(backbone, [4] * 32)
    (expected,), _ = stack.run(x, sequences, (0,))
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert twin.table.blocks[0].qkv.values.data_ptr() != stack.table.blocks[0].qkv.values.data_ptr()
        assert not torch.equal(twin.table.rows, stack.table.rows)
        for block in stack.blocks:
            assert block.qkv.values.any()
        (ours,), _ = twin.run(x, sequences, (0,))
        assert torch.equal(ours, expected)


@needs_native
def test_no_tokens():
    stack, backbone = stack_of("gpt2")
    x, _ = sequences_of(backbone, [1] * 8)
    offsets = torch.zeros(4, dtype=torch.int32)
    (tap,), last = packed_blocks(x[:0], stack.table, offsets, (1,))
    assert tap.shape == last.shape == (0, x.shape[1])


def wrong_tables(table):
    block, form = table.blocks[0], table.form
    norm = block.attention_norm
    narrow = norm._replace(weight=norm.weight[:-1])
    yield "must be float32", block._replace(attention_norm=norm._replace(weight=norm.weight.bfloat16())), form
    yield "must be float32", block._replace(feed_forward_norm=narrow), form
    yield "down must have", block._replace(down=block.up), form
    yield "not 48 outputs of 48 inputs in pairs", block._replace(output=replace(block.output, gated=True)), form
    yield "qkv.values must be", block._replace(qkv=replace(block.qkv, values=block.qkv.values.float())), form
    yield "are not the heads of", block, replace(form, v_offset=form.v_offset + 1000)


@needs_native
def test_weights_that_do_not_fit_are_refused():
    table = stack_of("bert")[0].table
    for message, block, form in wrong_tables(table):
        with pytest.raises(ValueError, match=message):
            Table([block], None, form)
    with pytest.raises(ValueError, match="at least one block"):
        Table([], None, table.form)


@needs_native
def test_inputs_that_do_not_fit_are_refused():
    stack, backbone = stack_of("t5-encoder")
    x, sequences = sequences_of(backbone, [5] * 16)
    table, offsets, bias = stack.table, sequences.offsets.host, sequences.bias
    with pytest.raises(ValueError, match=r"taps: 99 is not a block; there are blocks 0 to"):
        packed_blocks(x, table, offsets, (99,), bias)
    with pytest.raises(ValueError, match=r"bias must be float32 \(.*, S, S\) with S of at least 5"):
        packed_blocks(x, table, offsets, (0,), bias[:, :4])
    with pytest.raises(ValueError, match="rotation must be float32 two of"):
        packed_blocks(x, table, offsets, (0,), bias, (x.float(), x.float()))
    assert "int32" in why_not(x, table, offsets.long())
    assert "it takes contiguous torch.bfloat16" in why_not(x[:, :-1].contiguous(), table, offsets)


@needs_native
def test_a_backbone_in_another_dtype_is_refused():
    backbone = tlfast.freeze(tiny("bert"), precision="bf16").bfloat16()
    with pytest.raises(ValueError, match=r"must be .*float32"):
        backbone(**inputs_of("bert"))


@needs_native
def test_a_nan_stays_in_its_sequence():
    stack, backbone = stack_of("bert", "int8")
    x, sequences = sequences_of(backbone, [6] * 32)
    x[3 * 6 + 2] = torch.nan
    (tap,), _ = stack.run(x, sequences, (1,))
    hit = torch.isnan(tap).any(1).view(32, 6)
    assert hit[3].all()
    assert not hit[torch.arange(32) != 3].any()


@needs_native
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_forward_takes_it(family, monkeypatch):
    backbone = tlfast.freeze(tiny(family), precision="bf16")
    inputs = inputs_of(family)
    ours = backbone(**inputs)
    monkeypatch.setattr("tlfast.backbone.packed.why_not_at_once", lambda *_: "asked not to")
    expected = backbone(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours.taps, expected.taps, strict=True))
