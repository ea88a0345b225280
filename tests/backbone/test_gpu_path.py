"""The frozen forward as a CUDA GPU runs it: on the CPU under Triton's interpreter, and by shapes and devices alone."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

import tlfast
from tests.backbone.test_precision import errors, outputs
from tests.models import inputs_of, tiny
from tests.ops.interpreter import interpreted
from tests.ops.test_packed_attention import flash
from tlfast.backbone import calibration, freezing, linear, packed
from tlfast.backbone.linear import FrozenLinear
from tlfast.backbone.packed import PackedStack
from tlfast.backbone.sequences import Offsets, Sequences
from tlfast.ops import FrozenWeight, _dispatch, frozen_linear, norm_tap, packed_attention, quantise_rows
from tlfast.ops.packed_attention import varlen

API, WEIGHT = (importlib.import_module(f"tlfast.ops.frozen_linear.{name}") for name in ("api", "weight"))
PRECISIONS = ("bf16", "int8", "nf4", "fp8")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Weights lie in rows, "auto" takes what it takes for CUDA tensors, and tokens are in float32, which the
    interpreter has. PyTorch's flash attention, which needs a GPU, is replaced by its definition."""
    for module in (WEIGHT, linear):
        monkeypatch.setattr(module, "layout_for", lambda device, precision: "rows")
    monkeypatch.setitem(_dispatch.ORDER, "cpu", _dispatch.ORDER["cuda"])
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(freezing, "why_not_fp8", lambda device: None)
    monkeypatch.setattr(PackedStack, "_at_once", lambda self: None)
    monkeypatch.setattr(packed, "TOKENS", torch.float32)


@pytest.fixture
def taken(monkeypatch):
    """What each operation took."""
    found = {}
    choose = _dispatch.choose

    def watched(op, *arguments):
        chosen = choose(op, *arguments)
        found.setdefault(op, set()).add(chosen)
        return chosen

    monkeypatch.setattr(_dispatch, "choose", watched)
    return found


@interpreted
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_taps_err_as_the_references(family, precision, as_on_a_gpu, taken, monkeypatch):
    model, inputs = tiny(family), inputs_of(family)
    exact = tlfast.freeze(model)(**inputs)
    backbone = tlfast.freeze(model, precision)
    layers = [module for module in backbone.modules() if isinstance(module, FrozenLinear)]
    assert layers and {layer.stored.layout for layer in layers} == {"rows"}
    assert {row["path"] for row in backbone.describe()} == {"packed"}
    taken.clear()
    ours = errors(backbone(**inputs), exact)
    assert taken["frozen_linear"] == taken["norm_tap"] == {"triton"} and taken["packed_attention"] == {"varlen"}
    monkeypatch.setitem(_dispatch.ORDER, "cpu", ("reference",))
    plain = errors(backbone(**inputs), exact)
    assert (ours <= 1.5 * plain + torch.finfo(torch.float32).eps).all(), (ours, plain)


@interpreted
@pytest.mark.parametrize("precision", PRECISIONS[:3])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_moved_it_is_laid_out_anew(family, precision, monkeypatch):
    """From a GPU to the CPU: to the last bit the backbone that was prepared there."""
    model, inputs = tiny(family), inputs_of(family)
    here = tlfast.freeze(model, precision)
    with monkeypatch.context() as there:
        for module in (WEIGHT, linear):
            there.setattr(module, "layout_for", lambda device, precision: "rows")
        moved = tlfast.freeze(model, precision)
        moved._apply(torch.clone)
        assert all(m.stored.layout == "rows" for m in moved.modules() if isinstance(m, FrozenLinear))
    moved._apply(torch.clone)
    assert all(m.stored.layout == "panels" for m in moved.modules() if isinstance(m, FrozenLinear))
    for ours, expected in zip(outputs(moved(**inputs)), outputs(here(**inputs)), strict=True):
        assert torch.equal(ours, expected)


def test_fp8_is_refused_where_no_gpu_is():
    with pytest.raises(ValueError, match=r"'fp8' cannot run here: .* on cpu; move the model to such a GPU"):
        tlfast.freeze(tiny("bert"), "fp8")


def test_fp8_is_refused_by_an_older_gpu(monkeypatch):
    monkeypatch.setattr(_dispatch, "MISSING", {})
    monkeypatch.setattr(API, "capability", lambda device: 86)
    assert "compute capability 9.0 or newer, and cuda:0 has 8.6" in API.why_not_fp8(torch.device("cuda", 0))
    monkeypatch.setattr(API, "capability", lambda device: 90)
    assert API.why_not_fp8(torch.device("cuda", 0)) is None


def test_fp8_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(freezing, "why_not_fp8", lambda device: None)
    backbone, inputs = tlfast.freeze(tiny("bert"), "fp8"), inputs_of("bert")
    backbone.save_pretrained(tmp_path / "bert")
    loaded = tlfast.FrozenBackbone.from_pretrained(tmp_path / "bert")
    assert loaded.precision == "fp8" and loaded.weight_bytes() == backbone.weight_bytes()
    for ours, expected in zip(outputs(loaded(**inputs)), outputs(backbone(**inputs)), strict=True):
        assert torch.equal(ours, expected)
    assert all(0 < row["weight_error"] < 0.04 for row in backbone.describe())


def on_fake_gpu(value):
    """The same, of tensors that have a shape and a device but no numbers."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    if dataclasses.is_dataclass(value):
        fields = {field.name: on_fake_gpu(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


@pytest.fixture
def fake_gpu(monkeypatch):
    """A mode in which CUDA tensors have shapes, and an H100's answers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(_dispatch, "MISSING", {})
    monkeypatch.setattr(_dispatch, "TRITON_INTERPRETED", False)
    for module in (API, varlen):
        monkeypatch.setattr(module, "capability", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_blocks_stay_on_the_gpu(family, precision, fake_gpu, taken, monkeypatch):
    """Shapes, dtypes and devices of every step; a tensor of another device is an error."""
    monkeypatch.setattr(WEIGHT, "layout_for", lambda device, precision: "rows")
    monkeypatch.setattr(freezing, "why_not_fp8", lambda device: None)
    backbone = tlfast.freeze(tiny(family), precision)
    monkeypatch.setattr(PackedStack, "_at_once", lambda self: None)
    stack = PackedStack(backbone.stack, backbone.model_type)
    assert stack.dtype == torch.bfloat16
    taken.clear()
    with fake_gpu:
        stack.blocks = [on_fake_gpu(block) for block in stack.blocks]
        stack.final_norm = on_fake_gpu(stack.final_norm)
        x = torch.empty(11, 48, dtype=torch.bfloat16, device="cuda")
        rotation = None
        if stack.spec.positions == "rotary":
            rotation = tuple(torch.empty(11, stack.spec.head_dim, device="cuda") for _ in range(2))
        offsets = Offsets(torch.tensor([0, 5, 11], dtype=torch.int32), torch.empty(3, dtype=torch.int32, device="cuda"))
        taps, last = stack.run(x, Sequences(offsets, None, rotation), (0, 1, 2))
    assert len(taps) == 3
    for tensor in (*taps, last):
        assert (tensor.device.type, tensor.dtype, tuple(tensor.shape)) == ("cuda", torch.bfloat16, (11, 48))
    assert taken["frozen_linear"] == taken["norm_tap"] == {"triton"} and taken["packed_attention"] == {"varlen"}


def test_what_auto_takes_of_each_operation_on_a_gpu(fake_gpu, taken):
    with fake_gpu:
        x = torch.empty(7, 64, dtype=torch.bfloat16, device="cuda")
        for dtype in (torch.int8, torch.float8_e4m3fn):
            values, scale = quantise_rows(x, dtype=dtype)
            assert (values.device.type, values.dtype, scale.shape) == ("cuda", dtype, (7,))
        assert norm_tap(x, x, quantise=torch.int8)[1].device.type == "cuda"
        assert norm_tap(torch.empty(2, 20000, device="cuda"))[1].shape == (2, 20000)
        weight = FrozenWeight("fp32", 8, 64, torch.empty(8, 64, device="cuda"))
        assert frozen_linear(x, weight, "gelu").device.type == "cuda"
    assert taken["quantise_rows"] == {"triton"} and taken["norm_tap"] == {"triton", "reference"}
    assert taken["frozen_linear"] == {"reference"}


def test_offsets_are_known_on_the_host_and_the_gpu(fake_gpu):
    with fake_gpu:
        offsets = Offsets.of(torch.full((3,), 7), torch.device("cuda", 0))
    assert offsets.host.device.type == "cpu" and offsets.placed.device.type == "cuda"
    assert offsets.placed.dtype == offsets.host.dtype == torch.int32 and offsets.placed.shape == (4,)


def test_calibration_runs_where_the_model_is():
    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))
            self.seen = []

        def forward(self, **inputs):
            self.seen += [tensor.device.type for tensor in inputs.values()]

    model = Recorder()
    calibration.smoothing(model, {}, [{"input_ids": torch.zeros(1, 2)}])
    assert model.seen == ["meta"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_on_a_gpu(family, precision, monkeypatch):
    if precision == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 products need compute capability 9.0")
    inputs = {name: tensor.cuda() for name, tensor in inputs_of(family).items()}
    exact = tlfast.freeze(tiny(family).cuda())(**inputs)
    backbone = tlfast.freeze(tiny(family).cuda(), precision)
    found = errors(backbone(**inputs), exact)
    # the CPU's kernels multiply the same numbers; fp8, which has none there, its reference
    monkeypatch.setattr(freezing, "why_not_fp8", lambda device: None)
    there = tlfast.freeze(tiny(family), precision)
    plain = errors(there(**inputs_of(family)), tlfast.freeze(tiny(family))(**inputs_of(family)))
    allowed = 1.5 * plain.to(found) + torch.finfo(torch.bfloat16).eps
    assert (found <= allowed).all(), (found, plain)
    back = backbone.cpu()
    assert all(m.stored.layout == "panels" for m in back.modules() if isinstance(m, FrozenLinear)) == (
        precision != "fp8"
    )


@pytest.mark.gpu
def test_saving_names_the_way_out(tmp_path):
    backbone = tlfast.freeze(tiny("bert").cuda(), "int8")
    with pytest.raises(ValueError, match=r"the weights are on cuda:0, .* call backbone\.cpu\(\) before"):
        backbone.save_pretrained(tmp_path / "bert")


@pytest.mark.gpu
def test_no_block_waits_for_the_gpu():
    backbone = tlfast.freeze(tiny("llama").cuda(), "bf16")
    fast = backbone._fast(backbone.stack)
    offsets = Offsets.of(torch.tensor([5, 6]), torch.device("cuda"))
    rotation = tuple(torch.randn(11, fast.spec.head_dim, device="cuda") for _ in range(2))
    x, sequences = torch.randn(11, 48, device="cuda").bfloat16(), Sequences(offsets, None, rotation)
    with torch.no_grad():
        expected = fast.run(x, sequences, (2,))[1]
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = fast.run(x, sequences, (2,))[1]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def test_packed_attention_checks_what_is_placed():
    q, starts = torch.zeros(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"on_device must be two of int32 \(2,\) on cpu, not torch.int64"):
        packed_attention(q, q, q, starts, on_device=(starts.long(), starts))
