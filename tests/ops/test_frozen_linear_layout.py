"""The two layouts of a stored weight: the same numbers, read by the CPU's kernels or by a GPU's."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tests.ops.interpreter import interpreted
from tests.ops.test_frozen_linear import case
from tlfast import _native, ops
from tlfast.ops import FrozenWeight, _dispatch, frozen_linear
from tlfast.ops.frozen_linear import ACTIVATIONS
from tlfast.ops.frozen_linear.reference import ACTIVATE

# the package has functions of these names
API, WEIGHT = (importlib.import_module(f"tlfast.ops.frozen_linear.{name}") for name in ("api", "weight"))
BOTH = ("bf16", "int8", "int8_weight_only", "nf4")
KERNELS = (*BOTH, "fp8")
SHAPES = [(1, 1, 1), (2, 63, 31), (33, 100, 64), (17, 65, 33), (5, 128, 70)]


def stored(weight, bias, precision):
    """A weight as the kernels of a GPU read it, on the CPU."""
    return FrozenWeight.of(weight, bias, precision).in_layout("rows")


def exact_of(x, weight):
    """The product in float64 of what is stored and of x as the product sees it, before the activation."""
    if weight.precision in ("int8", "fp8"):
        dtype = torch.int8 if weight.precision == "int8" else torch.float8_e4m3fn
        values, scale = ops.quantise_rows(x, weight.smooth, dtype, impl="reference")
        x = values.double() * scale.double()[:, None]
        x = x if weight.smooth is None else x / weight.smooth.double()
    else:
        x = x.bfloat16()
    bias = weight.bias_value()
    return F.linear(x.double(), weight.value().double(), None if bias is None else bias.double())


@given(st.integers(1, 70), st.integers(1, 150), st.sampled_from(BOTH), st.booleans())
def test_there_and_back_no_bit_changes(outputs, inputs, precision, gated):
    generator = torch.Generator().manual_seed(outputs)
    weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
    if gated:
        panels = FrozenWeight.of_gated(weight, -weight, (bias, 2 * bias), precision)
    else:
        panels = FrozenWeight.of(weight, bias, precision)
    rows = panels.in_layout("rows")
    assert (panels.layout, rows.layout) == ("panels", "rows")
    assert rows.values.dim() == 2 and rows.values.is_contiguous()
    assert sum(t.nbytes for t in rows.tensors.values()) == sum(t.nbytes for t in panels.tensors.values())
    assert torch.equal(rows.value(), panels.value())
    assert torch.equal(rows.bias_value(), panels.bias_value())
    again = rows.in_layout("panels")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in panels.tensors.items())
    assert rows.in_layout("rows") is rows


@pytest.mark.parametrize("precision", BOTH)
@pytest.mark.parametrize("gated", [False, True])
def test_laid_out_at_once_is_laid_out_later(precision, gated, monkeypatch):
    """What preparing on a GPU gives: there the layout is that of rows from the start."""
    _, weight, bias = case(1, 100, 37)
    make = {
        False: lambda: FrozenWeight.of(weight, bias, precision),
        True: lambda: FrozenWeight.of_gated(weight, weight + 1, (bias, -bias), precision),
    }[gated]
    later = make().in_layout("rows")
    monkeypatch.setattr(WEIGHT, "layout_for", lambda device, precision: "rows")
    at_once = make()
    for name, tensor in later.tensors.items():  # what fills up a panel may have another scale
        assert torch.equal(at_once.tensors[name][: later.outputs], tensor[: later.outputs]), name


@pytest.mark.parametrize("precision", BOTH)
def test_rows_side_by_side_are_one_weight(precision, monkeypatch):
    monkeypatch.setattr(WEIGHT, "layout_for", lambda device, precision: "rows")
    x, weight, bias = case(9, 70, 40)
    pieces = FrozenWeight.side_by_side([(weight, bias), (weight[:7], None), (weight[:32] * 2, bias[:32])], precision)
    joined = FrozenWeight.joined(pieces)
    assert joined.layout == "rows" and joined.values.data_ptr() == pieces[0].values.data_ptr()
    parts = frozen_linear(x, joined, impl="reference").split([64, 32, 32], dim=1)
    for part, piece in zip(parts, pieces, strict=True):
        torch.testing.assert_close(part[:, : piece.outputs], frozen_linear(x, piece, impl="reference"))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", KERNELS)
def test_triton_against_float64_of_what_is_stored(precision, shape):
    x, weight, bias = case(*shape)
    layer = stored(weight, bias, precision)
    exact = exact_of(x, layer)
    rounding = F.linear(x.double().abs(), weight.double().abs()) * torch.finfo(torch.float32).eps
    ours = frozen_linear(x, layer, impl="triton")
    assert_within_budget(precision, ours, exact.float(), exact, rounding)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("precision", KERNELS)
def test_triton_with_activations_and_gates(precision, activation):
    x, weight, bias = case(6, 64, 37)
    exact = ACTIVATE[activation](exact_of(x, layer := stored(weight, bias, precision)))
    rounding = 8 * torch.finfo(torch.float32).eps
    assert_within_budget("plain", frozen_linear(x, layer, activation, impl="triton"), exact.float(), exact, rounding)
    layer = FrozenWeight.of_gated(weight, weight.flip(0), (bias, -bias), precision).in_layout("rows")
    gates, rest = exact_of(x, layer).chunk(2, dim=1)
    exact, rounding = ACTIVATE[activation](gates) * rest, rounding * (1 + rest.abs())
    ours = frozen_linear(x.view(2, 3, 64), layer, activation, impl="triton")
    assert_within_budget("gated", ours.view(6, 37), exact.float(), exact, rounding)


@interpreted
def test_triton_smooths():
    x, weight, bias = case(9, 100, 40)
    smooth = torch.rand(100, generator=torch.Generator().manual_seed(1)) + 0.5
    layer = FrozenWeight.of(weight, bias, "int8", smooth).in_layout("rows")
    exact = exact_of(x, layer)
    assert_within_budget("smooth", frozen_linear(x, layer, impl="triton"), exact.float(), exact, 1e-6)


@interpreted
@pytest.mark.parametrize("precision", KERNELS)
def test_triton_on_no_rows_and_strided_ones(precision):
    x, weight, bias = case(6, 64, 40)
    layer = stored(weight, bias, precision)
    assert frozen_linear(x[:0], layer, "gelu", impl="triton").shape == (0, 40)
    whole = frozen_linear(x, layer, "gelu", impl="triton")
    assert torch.equal(frozen_linear(torch.cat((x, x), 1)[:, 64:], layer, "gelu", impl="triton"), whole)
    assert torch.equal(frozen_linear(x.T.contiguous().T, layer, "gelu", impl="triton"), whole)


def test_fp8_has_a_scale_a_row():
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 40)[:, None]
    layer = FrozenWeight.of(weight, None, "fp8")
    assert (layer.values.dtype, layer.layout) == (torch.float8_e4m3fn, "rows")
    largest = weight.abs().amax(1, keepdim=True)
    # three bits behind the first of each number, down to a 2^15th of a row's largest
    assert ((layer.value() - weight).abs() <= weight.abs() * 2**-4 + largest * 2**-18).all()
    assert FrozenWeight.of(torch.zeros(3, 64), None, "fp8").value().abs().max() == 0


def test_fp8_reference_is_the_formula():
    x, weight, bias = case(7, 130, 33)
    layer = FrozenWeight.of(weight, bias, "fp8")
    exact = exact_of(x, layer)
    assert_within_budget("fp8", frozen_linear(x, layer, impl="reference"), exact.float(), exact, 1e-6)


def test_errors_name_the_way_out():
    x, weight, bias = case(4, 64, 8)
    panels = FrozenWeight.of(weight, bias, "int8")
    with pytest.raises(ValueError, match="layout must be one of \\('panels', 'rows'\\), not 'columns'"):
        panels.in_layout("columns")
    with pytest.raises(ValueError, match="layout must be 'rows' with precision='fp8'"):
        FrozenWeight.of(weight, bias, "fp8").in_layout("panels")
    if _dispatch.MISSING.get("native") is None:
        with pytest.raises(RuntimeError, match="in panels, and this one lies in rows: use weight"):
            frozen_linear(x, panels.in_layout("rows"), impl="native")
        with pytest.raises(RuntimeError, match="precision 'fp8' has no kernel on the CPU; use impl='reference'"):
            frozen_linear(x, FrozenWeight.of(weight, bias, "fp8"), impl="native")
    rows = panels.in_layout("rows")
    assert torch.equal(frozen_linear(x, rows), frozen_linear(x, rows, impl="reference"))


@interpreted
def test_what_the_interpreter_cannot_do_is_refused():
    x, weight, bias = case(4, 64, 8)
    with pytest.raises(RuntimeError, match="it reads weights in rows, and this one lies in panels"):
        frozen_linear(x, FrozenWeight.of(weight, bias, "int8"), impl="triton")
    with pytest.raises(RuntimeError, match="products in float32 are PyTorch's own; use impl='reference'"):
        frozen_linear(x, FrozenWeight.of(weight, bias), impl="triton")
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        frozen_linear(x.bfloat16(), stored(weight, bias, "nf4"), impl="triton")


def test_what_auto_takes_on_a_gpu(monkeypatch):
    found = {80: 0, 89: 0, 90: 0}
    monkeypatch.setattr(_dispatch, "MISSING", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability in found:
        monkeypatch.setattr(API, "capability", lambda device, known=capability: known)
        taken = {precision: API.automatic(precision) for precision in ("fp32", *KERNELS)}
        assert taken.pop("fp32") == ("reference", "products in float32 are PyTorch's own; use impl='reference'")
        fp8, why = taken.pop("fp8")
        assert (fp8 == "triton") == (capability == 90) and ("9.0 or newer, and cuda:0 has" in why) == (capability < 90)
        assert {name for name, _ in taken.values()} == {"triton"}
    monkeypatch.setattr(API, "capability", lambda device: 75)
    assert API.automatic("int8")[0] == "reference"
    assert "capability 8.0 or newer" in API.automatic("int8")[1]


def test_the_library_is_told(monkeypatch):
    assert "triton" in ops.implementations("frozen_linear")
    if _native.why_not() is None and not torch.cuda.is_available():
        assert ops.describe()["frozen_linear"]["auto"] == "native"
