"""A float32 model over packed tokens: as exact as PyTorch, its weights read where they are; what stays modules."""

import copy
import pickle

import pytest
import torch
from transformers import BertConfig, BertModel

import tlfast
from tests.budget import assert_within_budget
from tests.models import CONFIGS, inputs_of, tiny
from tests.ops.norm_cases import needs_native
from tlfast import _native
from tlfast.backbone import packed, packed_block
from tlfast.backbone.sequences import Offsets, Sequences
from tlfast.ops import _shared_weight
from tlfast.ops.packed_blocks import SharedWeight, api

fast = pytest.mark.skipif(_shared_weight.why_not_native() is not None, reason=str(_shared_weight.why_not_native()))
pytestmark = [needs_native, fast]

AT_ONCE = ["bert", "gpt2", "llama", "mistral", "opt", "qwen2", "t5-encoder", "vit", "clip-vision", "clip-text"]
AS_MODULES = {
    "qwen3": "more norms or attention",
    "gemma2": "config.attn_logit_softcapping is set",
    "dinov2": "outputs are scaled",
    "deberta-v2": "relative positions",
}


@pytest.fixture(autouse=True, params=[True, False], ids=["at-once", "one-by-one"])
def route(request, monkeypatch):
    """Both ways to run the blocks: which is faster is the machine's."""
    monkeypatch.setattr(packed, "pays_in_float32", lambda: request.param)


@pytest.fixture
def any_width(monkeypatch):
    monkeypatch.setattr(packed_block, "FP32_WIDTH", 1)


def wide(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 500, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=97, **sizes | settings)).eval()


def outputs(found):
    return [*found.taps, found.last_hidden_state]


def through_modules(backbone, inputs):
    with backbone.through_modules():
        return backbone(**inputs)


@pytest.mark.parametrize("family", AT_ONCE)
def test_errs_as_pytorch_does(family, any_width):
    model, inputs = tiny(family), inputs_of(family)
    backbone = tlfast.freeze(model)
    assert {row["path"] for row in backbone.describe()} == {"packed"}
    exact = tlfast.freeze(copy.deepcopy(model))
    exact.model.double()
    wide_inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    found = zip(
        outputs(backbone(**inputs)),
        outputs(through_modules(backbone, inputs)),
        outputs(exact(**wide_inputs)),
        strict=True,
    )
    for index, (ours, plain, reference) in enumerate(found):
        # a norm's rounding of sums that PyTorch takes in another order, relative to the largest
        rounding = torch.finfo(torch.float32).eps * reference.abs().amax()
        assert_within_budget(f"{family} {index}", ours, plain, reference, rounding)


@pytest.mark.parametrize("family", AS_MODULES)
def test_what_runs_as_modules_says_why(family, any_width):
    backbone = tlfast.freeze(tiny(family))
    assert all(row["path"] == "module" and AS_MODULES[family] in row["why"] for row in backbone.describe())
    inputs = inputs_of(family)
    for ours, theirs in zip(outputs(backbone(**inputs)), outputs(through_modules(backbone, inputs)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", CONFIGS)
def test_narrow_blocks_keep_the_last_bit(family):
    assert {row["path"] for row in tlfast.freeze(tiny(family)).describe()} == {"module"}


@pytest.mark.parametrize("lengths", [[300], [40, 2, 2], [1], [9] * 40, [7, 0, 3]])
def test_any_lengths(lengths):
    model = wide()
    backbone = tlfast.freeze(model)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ours, plain = backbone(input_ids=ids, attention_mask=mask), through_modules(backbone, inputs_with(ids, mask))
    for a, b in zip(outputs(ours), outputs(plain), strict=True):
        torch.testing.assert_close(a[mask], b[mask], atol=2e-5, rtol=2e-5)
        assert not a[~mask].any()


@pytest.mark.parametrize("lengths", [[500] * 5, [1024, 1, 0, 1023], [3] * 700, [2000], [0, 0, 1500, 0], [0, 0]])
def test_pieces_are_all_tokens_once(lengths):
    counts = torch.tensor(lengths)
    rotation = tuple(torch.arange(sum(lengths))[:, None] + side for side in range(2))
    whole = Sequences(Offsets.of(counts, torch.device("cpu")), None, rotation)
    pieces = list(whole.pieces(1024))
    assert torch.equal(torch.cat([piece.offsets.host.diff() for _, piece in pieces]), counts.to(torch.int32))
    ends = [rows.stop for rows, _ in pieces]
    assert [rows.start for rows, _ in pieces] == [0, *ends[:-1]] and ends[-1] == sum(lengths)
    assert all(rows.stop - rows.start >= 1024 for rows, _ in pieces[:-1])
    for rows, piece in pieces:
        assert int(piece.offsets.host[0]) == 0 and torch.equal(
            piece.rotation[1][:, 0], torch.arange(rows.start, rows.stop) + 1
        )


@pytest.mark.parametrize("family", ["bert", "llama", "t5-encoder", "gpt2"])
def test_in_pieces_as_whole(family, any_width, monkeypatch):
    backbone = tlfast.freeze(tiny(family))
    ids = torch.randint(3, 90, (9, 11))
    mask = torch.arange(11)[None] < torch.tensor([11, 3, 0, 7, 11, 1, 9, 2, 5])[:, None]
    whole = backbone(**inputs_with(ids, mask))
    monkeypatch.setattr(packed, "_PIECE", 10)
    for ours, theirs in zip(outputs(backbone(**inputs_with(ids, mask))), outputs(whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    seen = []
    last = backbone(**inputs_with(ids, mask), visit=seen.append).last_hidden_state
    for ours, theirs in zip((*seen, last), (whole.embedding, *whole.taps, whole.last_hidden_state), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def inputs_with(ids, mask):
    return {"input_ids": ids, "attention_mask": mask}


def randomise(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def assert_as_modules_compute(backbone, close=True, **inputs):
    ours, plain = backbone(**inputs), through_modules(backbone, inputs)
    for a, b in zip(outputs(ours), outputs(plain), strict=True):
        if close:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
        else:
            assert torch.equal(a, b)


def test_weights_are_shared_and_read_as_they_are_now():
    model = randomise(wide())
    backbone = tlfast.freeze(model)
    ids = torch.randint(3, 97, (4, 9))
    before = backbone(input_ids=ids).last_hidden_state
    assert backbone.weight_bytes() == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    # in place: not what a frozen model is for, but matrices, biases and norms stay those of one model
    model.load_state_dict(randomise(BertModel(model.config)).state_dict())
    assert_as_modules_compute(backbone, input_ids=ids)
    assert not torch.allclose(before, backbone(input_ids=ids).last_hidden_state)
    model.encoder.layer[1] = randomise(BertModel(model.config).eval()).encoder.layer[1]
    assert_as_modules_compute(backbone, input_ids=ids)
    assert backbone.describe()[1]["path"] == "packed"


def double_a_block(model):
    return model.encoder.layer[1].output.dense.double()


def wrap_a_layer(model):
    class Wrapped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    old = model.encoder.layer[1].output.dense
    new = Wrapped(old.in_features, old.out_features)
    new.weight, new.bias = old.weight, old.bias
    model.encoder.layer[1].output.dense = new


def watch_a_layer(model):
    model.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, output: output + 1)


def turn_a_weight(model):
    weight = model.encoder.layer[1].attention.self.query.weight
    weight.data = weight.data.T.contiguous().T


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    ("change", "why"),
    [(wrap_a_layer, "is a Wrapped"), (watch_a_layer, "hooks watch"), (turn_a_weight, "different orders")],
)
def test_what_is_changed_runs_as_modules(change, why, early):
    model, ids = randomise(wide()), torch.randint(3, 97, (4, 9))
    if early:
        change(model)
    backbone = tlfast.freeze(model)
    if not early:
        backbone(input_ids=ids)
        change(model)
    assert_as_modules_compute(backbone, close=False, input_ids=ids)
    assert why in backbone.describe()[0]["why"]


def test_a_block_in_another_dtype_is_not_multiplied_as_float32():
    model, ids = randomise(wide()), torch.randint(3, 97, (4, 9))
    backbone = tlfast.freeze(model)
    backbone(input_ids=ids)
    double_a_block(model)
    assert "not float32 on the CPU" in backbone.describe()[0]["why"]
    with pytest.raises(RuntimeError, match="dtype"):  # as transformers says it
        backbone(input_ids=ids)


def test_what_blocks_themselves_are_given_reaches_them(any_width):
    backbone, inputs = tlfast.freeze(tiny("gpt2")), {"input_ids": torch.randint(3, 90, (2, 5))}
    with torch.no_grad():
        past = backbone.model(torch.randint(3, 90, (2, 4)), use_cache=True).past_key_values
    given = {"past_key_values": copy.deepcopy(past), "use_cache": True}
    ours = backbone(**inputs, **given)
    theirs = through_modules(backbone, inputs | {"past_key_values": copy.deepcopy(past), "use_cache": True})
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert not torch.allclose(ours.last_hidden_state, backbone(**inputs).last_hidden_state, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", [{"scale_attn_weights": False}, {"add_cross_attention": True}])
def test_settings_that_packed_attention_has_not(setting, precision, any_width):
    (name,) = setting
    rows = tlfast.freeze(tiny("gpt2", **setting), precision).describe()
    assert all(row["path"] == "module" and name in row["why"] for row in rows)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda backbone: pickle.loads(pickle.dumps(backbone))])
def test_a_copy_reads_its_own_weights(copied):
    backbone, ids = tlfast.freeze(wide()), torch.randint(3, 97, (4, 9))
    expected = backbone(input_ids=ids).last_hidden_state
    twin = copied(backbone)
    for parameter in backbone.model.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(input_ids=ids).last_hidden_state, expected)


def test_a_model_in_another_dtype_runs_as_modules():
    backbone, ids = tlfast.freeze(wide()), torch.randint(3, 97, (4, 9))
    backbone(input_ids=ids)
    backbone.model.double()
    assert torch.equal(
        backbone(input_ids=ids).last_hidden_state, through_modules(backbone, {"input_ids": ids}).last_hidden_state
    )
    assert backbone(input_ids=ids).taps[0].dtype == torch.float64


def test_nan_stays_in_its_sequence():
    model = wide()
    model.embeddings.word_embeddings.weight.data[5] = torch.nan
    ids = torch.tensor([[6, 7, 8], [6, 5, 8], [9, 10, 11]])
    out = tlfast.freeze(model)(input_ids=ids).last_hidden_state
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", ["v4", "vnni"])
def test_every_instruction_set_that_has_it(isa, fresh_process):
    code = (
        "import torch, tlfast\n"
        "from tests.backbone.test_fp32 import wide, outputs, through_modules\n"
        "from tlfast import _native\n"
        "from tlfast.backbone import packed\n"
        "packed.pays_in_float32 = lambda: True\n"
        "b, ids = tlfast.freeze(wide()), torch.randint(3, 97, (9, 17))\n"
        "ours, plain = b(input_ids=ids), through_modules(b, {'input_ids': ids})\n"
        "error = max((x - y).abs().max().item() for x, y in zip(outputs(ours), outputs(plain)))\n"
        "print(_native.matrix_isa().startswith('AVX-512'), b.describe()[0]['path'], error < 2e-5)"
    )
    assert fresh_process(code, TLFAST_CPU_ISA=isa) == "True packed True"


def test_without_avx512_its_blocks_are_modules(monkeypatch):
    monkeypatch.setattr(_native, "matrix_isa", lambda: "AVX2")
    row = tlfast.freeze(wide()).describe()[0]
    assert row["path"] == "module" and "need AVX-512 or AMX, and this machine has AVX2" in row["why"]


@pytest.mark.parametrize("factor, expected", [(1.1, False), (1.3, True)])
def test_only_clearly_faster_products_run_blocks_at_once(factor, expected, monkeypatch):
    monkeypatch.setattr(api, "times_faster", lambda product, than, rounds: factor)
    api.pays_in_float32.cache_clear()
    try:
        assert api.pays_in_float32() is expected
        monkeypatch.setattr(_native, "matrix_isa", lambda: "AVX2")
        api.pays_in_float32.cache_clear()
        assert not api.pays_in_float32()
    finally:
        api.pays_in_float32.cache_clear()


class TestSharedWeight:
    @pytest.mark.parametrize("gated", [False, True])
    def test_refuses_parts_that_do_not_fit(self, gated):
        a, b = torch.randn(8, 4), torch.randn(8, 5)
        for message, parts in {
            "the same inputs and strides": [a, b],
            "float32 matrices": [a.double()] * 2,
            "at most 3|two of one shape": [a] * 4,
        }.items():
            with pytest.raises(ValueError, match=message):
                SharedWeight.of(parts, gated=gated)
        with pytest.raises(ValueError, match="two of one shape where gated"):
            SharedWeight.of([a], gated=True)

    @pytest.mark.parametrize("widths", [(8, 8), (33, 33), (100, 100)])
    def test_a_gated_layer_is_its_formula(self, widths):
        gate, up = (torch.randn(width, 12) for width in widths)
        biases = [torch.randn(width) for width in widths]
        x = torch.randn(5, 12)
        expected = torch.nn.functional.silu(x @ gate.T + biases[0]) * (x @ up.T + biases[1])
        ours = SharedWeight.of([gate, up], biases, gated=True).linear(x, "silu")
        torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("widths", [(32, 32, 32), (40, 8, 33)])
    @pytest.mark.parametrize("biased", [(True, True, True), (True, False, True), (False, False, False)])
    @pytest.mark.parametrize("graph", [False, True])
    def test_parts_lie_side_by_side(self, widths, biased, graph):
        parts = [torch.randn(width, 12) for width in widths]
        biases = [torch.randn(width) if has else None for width, has in zip(widths, biased, strict=True)]
        x, layer = torch.randn(5, 12, requires_grad=graph), SharedWeight.of(parts, biases)
        with torch.set_grad_enabled(graph):
            ours = layer.linear(x)
        assert ours.requires_grad is graph and ours.shape == (5, layer.outputs)
        pieces = ours.split(
            [-(-width // 32) * 32 for width in widths[:-1]]
            + [layer.outputs - sum(-(-w // 32) * 32 for w in widths[:-1])],
            dim=1,
        )
        for piece, part, bias in zip(pieces, parts, biases, strict=True):
            torch.testing.assert_close(piece[:, : len(part)], torch.nn.functional.linear(x, part, bias))
            assert not piece[:, len(part) :].any()

    @pytest.mark.parametrize("rows", [0, 5, 1500, 2500])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("graph", [False, True])
    def test_a_layer_behind_a_hidden_one(self, rows, gated, graph):
        up = SharedWeight.of([torch.randn(40, 12)] * (2 if gated else 1), gated=gated)
        down = SharedWeight.of([torch.randn(12, 40)], [torch.randn(12)])
        x = torch.randn(rows, 12, requires_grad=graph)
        with torch.set_grad_enabled(graph):
            ours = down.after(up, "gelu", x)
        assert ours.requires_grad is graph
        torch.testing.assert_close(ours, down.linear(up.linear(x, "gelu")))
