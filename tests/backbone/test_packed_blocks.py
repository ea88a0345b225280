"""All blocks in one native call against the same operations one by one, to the last bit."""

import pytest
import torch

import tlfast
from tests.models import inputs_of, tiny
from tests.ops.norm_cases import needs_native
from tlfast.backbone.packed import Batch, PackedStack
from tlfast.ops.packed_blocks import packed_blocks, why_not

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
    assert why_not(x, stack._table, sequences.cu_seqlens) is None
    for taps in (tuple(range(count)), (0,), (count - 1,)):
        taken, last = stack.run(x, sequences, taps)
        expected, expected_last = stack.run_one_by_one(x, sequences, taps)
        assert len(taken) == len(taps)
        for ours, theirs in zip((*taken, last), (*expected, expected_last), strict=True):
            assert torch.equal(ours, theirs)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same(threads):
    stack, backbone = stack_of("bert")
    x, sequences = sequences_of(backbone, [5] * 64)
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
        assert stack_of(family)[0]._table is None
    stack, backbone = stack_of("bert")
    x, sequences = sequences_of(backbone, [40, 2, 2])
    table, offsets = stack._table, sequences.cu_seqlens
    assert "cannot be shared out to 2 threads" in why_not(x, table, offsets, threads=2)
    assert why_not(x, table, offsets, threads=1) is None
    assert "float32" in why_not(x.float(), table, offsets)
    assert "must rise from 0 to the 44 tokens" in why_not(x, table, offsets.flip(0))
    with pytest.raises(RuntimeError, match=r"packed_blocks cannot run: .* run the operations one by one"):
        packed_blocks(x.float(), table, stack._form, offsets, (0,))


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
