"""Backbones stored in fewer bits: their taps, their bytes, what they leave alone, and what they refuse."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import tlfast
from tests.models import CONFIGS, IMAGE_ENCODERS, inputs_of, tiny
from tlfast.backbone.linear import FrozenLinear
from tlfast.ladder.moments import measure

PRECISIONS = ("bf16", "int8", "nf4")
PACKED = [name for name in CONFIGS if name not in ("deberta-v2", "modernbert", "opt-projected", "gemma2")]
TEXT = [name for name in PACKED if name not in IMAGE_ENCODERS]


def outputs(output):
    halves = (output.encoder, output.decoder) if hasattr(output, "encoder") else (output,)
    return [tensor for half in halves for tensor in (*half.taps, half.last_hidden_state)]


def encoder_of(output):
    return getattr(output, "encoder", output)


def errors(ours, exact):
    pairs = zip(outputs(ours), outputs(exact), strict=True)
    return torch.stack([(a.double() - b.double()).norm() / b.double().norm() for a, b in pairs])


def with_stored_weights(model, backbone):
    """The model in float64 with the weights that a backbone holds, as they are folded."""
    exact = copy.deepcopy(model).double()
    for name, parameter in exact.named_parameters():
        path, _, kind = name.rpartition(".")
        value = getattr(backbone.model.get_submodule(path), kind).double()
        is_columns = kind == "weight" and type(exact.get_submodule(path)).__name__ == "Conv1D"
        parameter.data = value.T if is_columns else value
    return exact


def exact_backbone(model):
    """The backbone of a model in float64, which freeze itself does not take."""
    plain = tlfast.freeze(copy.deepcopy(model).float())
    plain.model.double()
    return plain


def run(backbone, inputs):
    return backbone(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})


ROUNDINGS = 6  # activations in bfloat16 as well, about three roundings a layer for one of the weights


def errors_of_bf16_weights(model, inputs, exact):
    """Of the model in float32 with its weights, and nothing else, in bfloat16."""
    return errors(tlfast.freeze(copy.deepcopy(model).bfloat16().float())(**inputs), exact)


def assert_as_exact_as_bf16(model, inputs):
    exact = tlfast.freeze(model)(**inputs)
    found = errors(tlfast.freeze(model, "bf16")(**inputs), exact)
    assert (found <= ROUNDINGS * errors_of_bf16_weights(model, inputs, exact) + torch.finfo(torch.bfloat16).eps).all()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_taps_err_by_what_is_stored_and_what_bfloat16_rounds(family, precision):
    model, inputs = tiny(family), inputs_of(family)
    exact = run(exact_backbone(model), inputs)
    rounded = errors_of_bf16_weights(model, inputs, exact)
    backbone = tlfast.freeze(model, precision)
    found = errors(backbone(**inputs), exact)
    if precision == "bf16":
        assert (found <= ROUNDINGS * rounded + torch.finfo(torch.bfloat16).eps).all(), (found, rounded)
    of_stored = errors(run(exact_backbone(with_stored_weights(model, backbone)), inputs), exact)
    quantised = 8 if precision == "int8" else 0  # int8 also rounds what goes into its products
    assert (found <= 1.5 * of_stored + (ROUNDINGS + quantised) * rounded + torch.finfo(torch.bfloat16).eps).all()


@pytest.mark.parametrize("family", PACKED)
def test_these_families_are_packed(family):
    rows = tlfast.freeze(tiny(family), "int8").describe()
    assert [row["path"] for row in rows] == ["packed"] * len(rows)
    assert all(0 < row["weight_error"] < 0.02 for row in rows)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(PACKED)))
def test_the_others_say_why_not(family):
    rows = tlfast.freeze(tiny(family), "int8").describe()
    assert any(row["path"] == "module" and row["why"] for row in rows)
    assert all(bool(row["why"]) == (row["path"] == "module") for row in rows)


@pytest.mark.parametrize("family", [*TEXT, "modernbert"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_padding_changes_nothing(family, precision):
    backbone = tlfast.freeze(tiny(family), precision)
    inputs = inputs_of(family)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 3:] = 0
    mask[1] = 0
    inputs["attention_mask"] = mask
    encoder = encoder_of(backbone(**inputs))
    packed = encoder_of(backbone(packed=True, **inputs))
    lengths = mask.sum(1)
    assert packed.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    for tap, tokens in zip((encoder.embedding, *encoder.taps), (packed.embedding, *packed.taps), strict=True):
        assert tap.shape[:2] == mask.shape
        assert (tap[~mask.bool()] == 0).all()
        assert torch.equal(tap[mask.bool()], tokens)
    if family in PACKED:
        alone = {name: tensor[:1, :3] for name, tensor in inputs.items()}
        for tap, one in zip(encoder.taps, encoder_of(backbone(**alone)).taps, strict=True):
            assert torch.equal(tap[:1, :3], one)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert", "t5-encoder"])
def test_left_padding_and_gaps_as_the_model_sees_them(family):
    model = tiny(family)
    inputs = inputs_of(family)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :2] = 0
    mask[1, 1:3] = 0
    inputs["attention_mask"] = mask
    exact, plain = tlfast.freeze(model)(**inputs), tlfast.freeze(model, "bf16")(**inputs)
    for ours, theirs in zip(plain.taps, exact.taps, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOWED = {
    "mistral": {"sliding_window": 4},
    "qwen2": SLIDING,
    "qwen3": SLIDING,
    "gemma2": SLIDING | {"attn_logit_softcapping": None},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_as_the_model_sees_them(family):
    model, inputs = tiny(family, **WINDOWED[family]), inputs_of(family)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :2] = 0  # on the left: positions count from there
    mask[1, 6:] = 0
    inputs["attention_mask"] = mask
    assert {row["path"] for row in tlfast.freeze(model, "bf16").describe()} == {"packed"}
    assert_as_exact_as_bf16(model, inputs)
    exact = tlfast.freeze(model)(**inputs)
    widened = tlfast.freeze(tiny(family, **WINDOWED[family] | {"sliding_window": 5}))(**inputs)
    assert errors(widened, exact).max() > 0.05  # one position more or less would show
    inputs["attention_mask"][2, 4] = 0  # a gap: places and distances differ, and the modules take over
    assert_as_exact_as_bf16(model, inputs)


@pytest.mark.parametrize("family", ["t5", "t5-v1.1", "bart"])
def test_a_decoder_reads_its_encoder_alone(family):
    model, inputs = tiny(family), inputs_of(family)
    inputs["attention_mask"][1, 1:3] = 0  # gaps in what is attended to
    inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    inputs["decoder_attention_mask"][0, 4:] = 0
    assert_as_exact_as_bf16(model, inputs)
    backbone = tlfast.freeze(model, "bf16")
    memory, mask = backbone(**inputs).encoder.last_hidden_state, inputs["attention_mask"]
    targets = {name: tensor for name, tensor in inputs.items() if name.startswith("decoder")}
    whole = backbone.decode(memory, mask, **targets)
    alone = backbone.decode(memory[:1], mask[:1], **{name: tensor[:1, :4] for name, tensor in targets.items()})
    for tap, one in zip(whole.taps, alone.taps, strict=True):
        assert torch.equal(tap[:1, :4], one)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_and_shortest_inputs(precision):
    backbone = tlfast.freeze(tiny("bert"), precision)
    ids = torch.randint(3, 90, (2, 5))
    assert [t.shape for t in outputs(backbone(input_ids=ids[:0]))] == [(0, 5, 48)] * 4
    assert [t.shape for t in outputs(backbone(input_ids=ids[:, :0]))] == [(2, 0, 48)] * 4
    one = backbone(input_ids=ids[:1, :1])
    assert one.taps[0].shape == (1, 1, 48)
    nothing = backbone(input_ids=ids, attention_mask=torch.zeros_like(ids))
    assert all((t == 0).all() for t in outputs(nothing))
    images = tlfast.freeze(tiny("vit"), precision)(pixel_values=torch.randn(3, 3, 16, 16))
    assert images.taps[0].shape[0] == 3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "vit"])
def test_the_model_is_left_alone(family, precision):
    model = tiny(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    plain = tlfast.freeze(model)
    reference = outputs(plain(**inputs_of(family)))
    backbone = tlfast.freeze(model, precision)
    backbone(**inputs_of(family))
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for x in (model, backbone) for m in x.modules())
    assert all(torch.equal(a, b) for a, b in zip(reference, outputs(plain(**inputs_of(family))), strict=True))
    assert backbone.fingerprint() == plain.fingerprint()


def test_the_models_own_weights_are_let_go():
    model = tiny("bert")
    weight = weakref.ref(model.encoder.layer[0].attention.self.query.weight)
    backbone = tlfast.freeze(model, "int8")
    del model
    gc.collect()
    assert weight() is None
    assert backbone(input_ids=torch.randint(3, 90, (2, 5))).taps


def test_bytes():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=3)
    model = BertModel(config, add_pooling_layer=False)
    plain = tlfast.freeze(model).weight_bytes()
    shares = {p: tlfast.freeze(model, p).weight_bytes() / plain for p in PRECISIONS}
    assert shares["bf16"] < 0.505
    assert shares["int8"] < 0.26
    assert shares["nf4"] < 0.24


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_ladder_climbs_it(family, precision):
    task = {"bert": "sequence-classification", "vit": "image-classification", "t5": "seq2seq-lm"}
    backbone = tlfast.freeze(tiny(family), precision)
    config = tlfast.LadderConfig(reduction=2)
    task_name = task.get(family, "causal-lm")
    labels = {} if task_name.endswith("lm") else {"num_labels": 2}
    ladder = tlfast.LadderModel(backbone, task=task_name, config=config, **labels)
    inputs = inputs_of(family)
    inputs.pop("decoder_input_ids", None)
    size = next(iter(inputs.values())).shape[0]
    target = inputs["input_ids"] if task_name.endswith("lm") else torch.arange(size) % 2
    ladder.train()
    optimizer = torch.optim.AdamW([p for p in ladder.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        loss = ladder(**inputs, labels=target).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_ladder_measures_what_passes_through_its_layers(family):
    inputs, model = inputs_of(family), tiny(family)
    exact, found = (measure(tlfast.freeze(model, precision), [inputs]) for precision in ("fp32", "bf16"))
    for name, moments in exact.items():
        assert moments.energy
        for key, energy in moments.energy.items():
            torch.testing.assert_close(found[name].energy[key], energy, rtol=0.05, atol=0.05 * float(energy.mean()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_generates_with_and_without_a_cache(family):
    torch.manual_seed(0)
    backbone = tlfast.freeze(tiny(family), "bf16")
    ladder = tlfast.LadderModel(backbone, task="causal-lm", config=tlfast.LadderConfig(reduction=2)).eval()
    ids = torch.randint(3, 90, (2, 5))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    cached, uncached = (ladder.generate(input_ids=ids, use_cache=cache, **settings) for cache in (True, False))
    assert cached.shape == uncached.shape == (2, 11)


def test_a_bank_answers_as_its_ladders():
    backbone = tlfast.freeze(tiny("bert"), "int8")
    config = tlfast.LadderConfig(reduction=2)
    ladders = {
        n: tlfast.LadderModel(backbone, task="sequence-classification", num_labels=2, config=config) for n in "ab"
    }
    inputs = inputs_of("bert")
    with torch.no_grad():
        for ladder in ladders.values():
            ladder(**inputs)  # which sets its starting weights
        for name, output in tlfast.LadderBank(ladders, backbone)(**inputs).items():
            alone = ladders[name].eval()(**inputs).logits
            assert (output.logits - alone).norm() < 0.02 * alone.norm()


def test_a_model_the_table_does_not_know():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

        def forward(self, x):
            return x + self.linear(self.norm(x)).tanh()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, inputs_embeds):
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds)
            return inputs_embeds

    net, x = Net(), torch.randn(2, 4, 64)
    exact = tlfast.freeze(net)(inputs_embeds=x)
    for precision, allowed in {"bf16": 0.005, "int8": 0.02, "nf4": 0.12}.items():
        backbone = tlfast.freeze(net, precision)
        assert isinstance(backbone.model.layers[0].linear, FrozenLinear)
        assert errors(backbone(inputs_embeds=x), exact).max() < allowed
        assert {row["why"] for row in backbone.describe()} == {"its family is not in the table"}


def test_calibration_on_real_inputs_errs_less_on_them():
    model = tiny("bert")
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[5] *= 40  # an outlier channel
    batch = {"input_ids": torch.randint(3, 90, (4, 10))}
    exact = tlfast.freeze(model)(**batch)
    given = errors(tlfast.freeze(model, "int8", calibration=[batch])(**batch), exact)
    made_up = errors(tlfast.freeze(model, "int8")(**batch), exact)
    assert given.mean() < 1.2 * made_up.mean()
    assert made_up.max() < 0.1


def test_errors():
    model = tiny("bert")
    batch = {"input_ids": torch.randint(3, 90, (2, 4))}
    with pytest.raises(ValueError, match="precision: 'int4' is not available; allowed: 'fp32', 'bf16', 'int8', 'nf4'"):
        tlfast.freeze(model, "int4")
    with pytest.raises(ValueError, match="calibration: only int8 is calibrated, and nf4 is not"):
        tlfast.freeze(model, "nf4", calibration=[batch])
    with pytest.raises(ValueError, match="calibration: there is no batch in it"):
        tlfast.freeze(model, "int8", calibration=[])
    with pytest.raises(ValueError, match="calibration: a batch is a list; pass dicts of tensors"):
        tlfast.freeze(model, "int8", calibration=[[1, 2]])
    with pytest.raises(ValueError, match="calibration: a batch is a dict; pass dicts of tensors"):
        tlfast.freeze(model, "int8", calibration=[{"input_ids": [[1, 2]]}])
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    for precision in PRECISIONS:
        with pytest.raises(ValueError, match="NaN or infinity"):
            tlfast.freeze(model, precision)


def test_image_models_are_here():
    assert set(IMAGE_ENCODERS) <= set(PACKED)


@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
def test_the_layer_alone_in_any_model(precision):
    linear = nn.Linear(48, 40)
    layer = tlfast.nn.FrozenLinear.of(linear, precision)
    net, x = nn.Sequential(layer, nn.ReLU()), torch.randn(2, 5, 48)
    exact = linear(x).detach()
    assert net(x).shape == (2, 5, 40) and not list(net.parameters())
    of_stored = (x @ (linear.weight - layer.weight).T).norm()
    rounding = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).eps
    assert (layer(x) - exact).norm() <= 1.5 * of_stored + 2 * rounding * exact.norm()
    assert f"in_features=48, out_features=40, precision={precision}" in repr(net)
