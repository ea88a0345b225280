"""Frozen linear layers: what each format stores, and its products against float64 and against the stored matrix."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from tests.budget import assert_within_budget
from tlfast import _native, ops
from tlfast.ops import FrozenWeight, frozen_linear
from tlfast.ops.frozen_linear import ACTIVATIONS, PRECISIONS, stored_layout
from tlfast.ops.frozen_linear.formats import NF4
from tlfast.ops.frozen_linear.operator import operator_arguments
from tlfast.ops.frozen_linear.panels import from_panels, to_panels
from tlfast.ops.frozen_linear.reference import ACTIVATE

native = pytest.mark.skipif(_native.why_not() is not None, reason=f"no native library: {_native.why_not()}")
amx = pytest.mark.skipif(_native.matrix_isa() != "AMX", reason=f"no AMX, but {_native.matrix_isa()}")
STORED = ("bf16", "int8", "int8_weight_only", "nf4")  # what the CPU's kernels read in panels
SHAPES = [(1, 1, 1), (1, 8, 3), (2, 63, 31), (17, 65, 33), (33, 100, 64), (16, 130, 97), (70, 800, 40)]


def case(rows, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    return x, weight / inputs**0.5, torch.randn(outputs, generator=generator)


def seen(x, weight):
    """(x, W) in float64 as the product sees them."""
    matrix, bias = weight.value(), weight.bias_value()
    if weight.precision in ("int8", "fp8"):
        dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[weight.precision]
        values, scale = ops.quantise_rows(x, weight.smooth, dtype, impl="reference")
        x = values.double() * scale.double()[:, None]
        x = x if weight.smooth is None else x / weight.smooth.double()
    elif weight.precision != "fp32":
        x, matrix = x.bfloat16(), matrix if weight.precision == "int8_weight_only" else matrix.bfloat16()
    return x.double(), matrix.double(), None if bias is None else bias.double()


def poisoned(monkeypatch):
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))


@native
@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_against_float64_of_what_is_stored(precision, shape, dtype, monkeypatch):
    x, weight, bias = case(*shape)
    x = x.to(dtype)
    stored = FrozenWeight.of(weight, bias, precision)
    inputs, matrix, offset = seen(x, stored)
    exact = F.linear(inputs, matrix, offset)
    plain = F.linear(inputs.float(), matrix.float(), offset.float())
    poisoned(monkeypatch)
    ours = frozen_linear(x, stored, out_dtype=torch.float32, impl="native")
    # a sum in float32 of K products: one rounding of the largest partial sum at least
    rounding = F.linear(inputs.abs(), matrix.abs()) * torch.finfo(torch.float32).eps
    assert_within_budget(precision, ours, plain, exact, rounding)


@amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_from_bfloat16_is_as_exact_as_pytorch(shape, monkeypatch):
    x, weight, bias = case(*shape)
    exact, plain = F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)
    poisoned(monkeypatch)
    ours = frozen_linear(x, FrozenWeight.of(weight, bias), impl="native")
    assert_within_budget("fp32", ours, plain, exact, exact.abs().mean() * torch.finfo(torch.float32).eps)


@amx
def test_float32_keeps_wide_ranges_and_infinities():
    x = torch.tensor([[1e30, 1.0, 1e-30, 0.0], [float("inf"), 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    weight = torch.tensor([[1e-30, 1e-7, 1e30, 1.0], [1.0, 0.0, 0.0, 0.0]])
    ours = frozen_linear(x, FrozenWeight.of(weight), impl="native")
    torch.testing.assert_close(ours[0], torch.tensor([2.0 + 1e-7, 1e30]), rtol=1e-6, atol=0)
    assert not torch.isfinite(ours[1]).any()
    torch.testing.assert_close(ours[2], F.linear(x[2], weight), rtol=1e-6, atol=0)


@native
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(precision, activation):
    x, weight, bias = case(33, 96, 70)
    stored = FrozenWeight.of(weight, bias, precision)
    inputs, matrix, offset = seen(x, stored)
    before = F.linear(inputs, matrix, offset)
    exact, plain = ACTIVATE[activation](before), ACTIVATE[activation](before.float())
    ours = frozen_linear(x, stored, activation)
    rounding = F.linear(inputs.abs(), matrix.abs()) * torch.finfo(torch.float32).eps
    assert_within_budget(activation, ours, plain, exact, rounding)


@native
@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gated(precision, width, with_bias):
    x, gate, bias = case(19, 64, width)
    up = case(19, 64, width, seed=1)[1]
    stored = FrozenWeight.of_gated(gate, up, (bias, -bias) if with_bias else None, precision)
    assert stored.width == width
    inputs, matrix, offset = seen(x, stored)
    sides = F.linear(inputs, matrix, offset).chunk(2, dim=-1)
    exact = F.silu(sides[0]) * sides[1]
    sides = F.linear(inputs.float(), matrix.float(), None if offset is None else offset.float()).chunk(2, dim=-1)
    size = F.linear(inputs.abs(), matrix.abs()).chunk(2, dim=-1)
    rounding = (size[0] * exact.abs().amax() + size[1]) * torch.finfo(torch.float32).eps
    assert_within_budget("gated", frozen_linear(x, stored, "silu"), F.silu(sides[0]) * sides[1], exact, rounding)
    distance = (stored.value() - torch.cat((gate, up))).norm() / torch.cat((gate, up)).norm()
    assert distance < {"bf16": 0.003, "nf4": 0.12}.get(precision, 0.01)


@native
@pytest.mark.parametrize("precision", ("fp32", *STORED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_rounds_its_output_once(precision, dtype):
    if precision == "fp32":
        pytest.skip("float32 gives float32")
    x, weight, bias = case(5, 64, 40)
    stored = FrozenWeight.of(weight, bias, precision)
    for activation in ("none", "gelu_tanh", "silu"):
        whole = frozen_linear(x.to(dtype), stored, activation, torch.float32, impl="native")
        rounded = frozen_linear(x.to(dtype), stored, activation, torch.bfloat16, impl="native")
        assert torch.equal(rounded, whole.bfloat16())


@native
@pytest.mark.parametrize("precision", STORED)
def test_gelu_for_bfloat16(precision):
    stored = FrozenWeight.of(torch.eye(32), None, precision)
    x = torch.linspace(-9.0, 9.0, 20011)[:, None].expand(-1, 32).contiguous()
    x[::7] *= 1e4
    exact = F.gelu(frozen_linear(x, stored, out_dtype=torch.float32, impl="native").double())
    ours = frozen_linear(x, stored, "gelu", torch.bfloat16, impl="native").double()
    assert ((ours - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
    assert torch.isnan(frozen_linear(torch.full((1, 32), torch.nan), stored, "gelu", torch.bfloat16)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_reference_is_the_formula(precision):
    x, weight, bias = case(7, 130, 33)
    smooth = torch.rand(130) + 0.5 if precision == "int8" else None
    stored = FrozenWeight.of(weight, bias, precision, smooth)
    inputs, matrix, offset = seen(x, stored)
    exact = F.gelu(F.linear(inputs, matrix, offset))
    plain = F.gelu(F.linear(inputs.float(), matrix.float(), offset.float()))
    ours = frozen_linear(x, stored, "gelu", impl="reference")
    assert_within_budget(precision, ours, plain, exact, exact.abs().mean() * torch.finfo(torch.float32).eps)


@native
def test_smoothing_undoes_itself():
    x, weight, bias = case(9, 100, 40)
    x[:, 3] *= 100
    smooth = 1 / x.abs().amax(0).sqrt()
    exact = F.linear(x.double(), weight.double(), bias.double())
    errors = [
        (frozen_linear(x, FrozenWeight.of(weight, bias, "int8", s)).double() - exact).norm() for s in (None, smooth)
    ]
    assert errors[1] < 0.5 * errors[0]
    stored = FrozenWeight.of(weight, bias, "int8", smooth)
    scale = (weight / smooth).abs().amax(1, keepdim=True) / 127
    assert ((stored.value() - weight).abs() <= 0.5001 * scale * smooth).all()


@native
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_in_its_row(precision):
    x, weight, bias = case(20, 64, 40)
    stored = FrozenWeight.of(weight, bias, precision)
    clean = frozen_linear(x, stored)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    spoilt = frozen_linear(x, stored)
    rows = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(spoilt[rows], clean[rows])
    assert not torch.isfinite(spoilt[3]).any()
    assert not torch.isfinite(spoilt[7]).any()


@native
@pytest.mark.parametrize("precision", PRECISIONS)
def test_strided_empty_and_more_dimensions(precision):
    x, weight, bias = case(24, 64, 40)
    stored = FrozenWeight.of(weight, bias, precision)
    whole = frozen_linear(x, stored)
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(frozen_linear(wide[:, :64], stored), whole)
    assert torch.equal(frozen_linear(x.view(4, 6, 64), stored), whole.view(4, 6, 40))
    assert frozen_linear(x[:0], stored).shape == (0, 40)
    assert torch.equal(frozen_linear(x.T.contiguous().T, stored), whole)


@native
@pytest.mark.parametrize("precision", STORED)
def test_threads_do_not_change_a_bit(precision):
    x, weight, bias = case(100, 256, 130)
    stored = FrozenWeight.of(weight, bias, precision)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(frozen_linear(x, stored, "gelu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@native
@pytest.mark.parametrize("isa", ["base", "v3", "v4", "vnni", "amx"])
def test_every_instruction_set(isa):
    code = """
import torch
from tests.ops.test_frozen_linear import case
from tlfast.ops import FrozenWeight, frozen_linear
for shape in ((1, 8, 3), (17, 65, 33), (40, 300, 97)):
    x, weight, bias = case(*shape)
    for precision in ("bf16", "int8", "int8_weight_only", "nf4"):
        gated = FrozenWeight.of_gated(weight, -weight, None, precision)
        for stored in (FrozenWeight.of(weight, bias, precision), gated):
            ours, exact = (frozen_linear(x, stored, "gelu", impl=impl) for impl in ("native", "reference"))
            assert (ours - exact).norm() <= 2e-6 * exact.norm(), (shape, precision)
print("right")
"""
    environment = os.environ | {"TLFAST_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "right", done.stderr


@given(st.integers(1, 80), st.integers(1, 150), st.sampled_from([1, 2, 4]))
@settings(max_examples=50, deadline=None)
def test_panels_hold_every_number_once(outputs, inputs, group):
    rows = torch.arange(outputs * inputs).view(outputs, inputs)
    panels = to_panels(rows, group, -1)
    assert torch.equal(from_panels(panels, outputs, inputs), rows)
    assert panels.numel() % (32 * 16 * group) == 0
    assert (panels == -1).sum() == panels.numel() - rows.numel()


@pytest.mark.parametrize("inputs", [64, 128, 384, 100])
def test_bytes_of_the_formats(inputs):
    weight = torch.randn(64, inputs)
    sizes = {p: sum(t.nbytes for t in FrozenWeight.of(weight, None, p).tensors.values()) for p in PRECISIONS}
    whole = -(-inputs // 64) * 64
    assert sizes["fp32"] == weight.nbytes
    assert sizes["bf16"] == 64 * -(-inputs // 32) * 32 * 2
    assert sizes["int8"] == sizes["int8_weight_only"] == sizes["fp8"] == 64 * whole + 64 * 4
    assert sizes["nf4"] == 64 * -(-inputs // 32) * 16 + 64 * whole // 64 + 64 * 4


def test_nf4_errs_less_than_the_nearest_code_at_each_groups_largest_number():
    weight = torch.randn(64, 200)
    stored = FrozenWeight.of(weight, None, "nf4").value()
    groups, ours = (F.pad(x, (0, 56)).view(64, 4, 64) for x in (weight, stored))
    table = torch.tensor(NF4)
    largest = groups.abs().amax(2, keepdim=True)
    codes = ((groups / largest)[..., None] - table).abs().argmin(-1)
    plain = (table[codes] * largest - groups).norm(dim=2)
    # the group's scale is itself rounded, by a 255th of its row's at most, which moves each of 64 values by no more
    rounding = 8 * (largest.amax(1, keepdim=True) / 255).squeeze(2)
    error = (ours - groups).norm(dim=2)
    assert (error <= plain + rounding).all()
    assert error.square().sum() < 0.97 * plain.square().sum()
    assert FrozenWeight.of(torch.zeros(3, 64), None, "nf4").value().abs().max() == 0


def test_side_by_side_is_one_weight_and_each_alone():
    x, weight, bias = case(9, 70, 40)
    pieces = [(weight, bias), (weight[:7], None), (weight[:32] * 2, bias[:32])]
    for precision in PRECISIONS[1:]:
        stored = FrozenWeight.side_by_side(pieces, precision)
        alone = [FrozenWeight.of(w, b, precision) for w, b in pieces]
        joined = FrozenWeight.joined(stored)
        assert joined is not None
        assert joined.values.data_ptr() == stored[0].values.data_ptr()
        parts = frozen_linear(x, joined).split([64, 32, 32], dim=1)
        for part, piece, one in zip(parts, stored, alone, strict=True):
            assert torch.equal(piece.value(), one.value())
            expected = frozen_linear(x, one)
            # fp8's product is PyTorch's here, whose last bit may depend on where a matrix begins
            exact = {} if precision == "fp8" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(frozen_linear(x, piece), expected, **exact)
            torch.testing.assert_close(part[:, : one.outputs], expected, **exact)
    apart = [FrozenWeight.of(w, b, "bf16") for w, b in pieces]
    assert FrozenWeight.joined(apart) is None


@native
@pytest.mark.parametrize("precision", STORED)
def test_operator(precision):
    x, weight, bias = case(8, 64, 33)
    stored = FrozenWeight.of(weight, bias, precision)
    arguments = (x, *operator_arguments(stored), "gelu", torch.float32, "native")
    opcheck(torch.ops.tlfast.frozen_linear.default, arguments)
    compiled = torch.compile(lambda t: frozen_linear(t, stored, "gelu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), frozen_linear(x, stored, "gelu"))


def test_errors():
    x, weight, bias = case(4, 16, 8)
    stored = FrozenWeight.of(weight, bias, "bf16")
    for message, call in {
        "precision must be one of": lambda: FrozenWeight.of(weight, bias, "fp4"),
        "weight must be \\(N, K\\)": lambda: FrozenWeight.of(weight.double(), bias),
        "NaN or infinity": lambda: FrozenWeight.of(weight / 0, bias),
        "smooth must be None": lambda: FrozenWeight.of(weight, bias, "bf16", torch.ones(16)),
        'must not be "fp32"': lambda: FrozenWeight.of_gated(weight, weight, None, "fp32"),
        "x must be a tensor in one of": lambda: frozen_linear(x.half(), stored),
        "x must be \\(..., 16\\)": lambda: frozen_linear(x[:, :5], stored),
        "weight must be a FrozenWeight": lambda: frozen_linear(x, weight),
        "requires a gradient": lambda: frozen_linear(x.requires_grad_(), stored),
        "activation must be one of": lambda: frozen_linear(x.detach(), stored, "swish"),
        "out_dtype must be one of": lambda: frozen_linear(x.detach(), stored, out_dtype=torch.float16),
        "impl='magic' is not one of": lambda: frozen_linear(x.detach(), stored, impl="magic"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_named_implementation_does_not_fall_back(monkeypatch):
    x, weight, bias = case(4, 16, 8)
    monkeypatch.setattr(_native, "matrix_isa", lambda: "AVX2")
    with pytest.raises(RuntimeError, match="need AVX-512 or AMX, and this machine has AVX2"):
        frozen_linear(x, FrozenWeight.of(weight, bias), impl="native")
    assert torch.equal(frozen_linear(x, FrozenWeight.of(weight, bias)), F.linear(x, weight, bias))
    assert "native" in ops.implementations("frozen_linear")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (32, 64), (33, 65), (100, 129)])
def test_the_layout_is_known_without_a_weight(precision, outputs, inputs):
    smooth = torch.ones(inputs) if precision == "int8" else None
    weight = FrozenWeight.of(torch.randn(outputs, inputs), torch.randn(outputs), precision, smooth)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weight.tensors.items()}
    assert stored_layout(precision, outputs, inputs) == found


def test_the_layout_of_an_unknown_precision():
    with pytest.raises(ValueError, match="precision must be one of"):
        stored_layout("int4", 1, 1)
