"""The frozen linear kernels under Triton's interpreter: against float64, within the error of PyTorch's own float32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.budget import assert_within_budget
from tests.ops.interpreter import interpreted
from tests.ops.linear_cases import ACTIVATIONS, nf4, plain_nf4, plain_quantised, quantised
from tlfast.ops.frozen_linear import triton_quantised, triton_tiles, triton_unpacked
from tlfast.ops.frozen_linear.formats import NF4
from tlfast.ops.frozen_linear.triton_activate import finished
from tlfast.ops.frozen_linear.triton_quantised import fp8_linear, int8_linear, quantised_configs
from tlfast.ops.frozen_linear.triton_unpacked import int8_weight_configs, int8_weight_linear, nf4_configs, nf4_linear

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

FP8 = torch.float8_e4m3fn
LAUNCHERS = {torch.int8: int8_linear, FP8: fp8_linear}
SHAPES = [(1, 37, 16), (63, 100, 272), (65, 1, 144), (7, 130, 400)]
NF4_SHAPES = [(1, 37, 64), (63, 100, 320), (65, 1, 128), (7, 130, 448)]
INT8_WEIGHT_TILES = len(int8_weight_configs(2, 2))
QUANTISED_TILES = len(quantised_configs(90, "none", 2))
NF4_TILES = len(nf4_configs(2, 2))


def assert_quantised(shape, dtype, activation="none", bias=True, out_dtype=torch.float32):
    pooled = []
    for seed in range(3):
        inputs = quantised(*shape, dtype, bias, seed=seed)
        ours = LAUNCHERS[dtype](*inputs, activation, out_dtype)
        plain = plain_quantised(inputs, activation, out_dtype)
        pooled.append((ours, plain, plain_quantised(inputs, activation, torch.float64, torch.float64)))
    assert_within_budget(f"{dtype} {activation}", *(torch.stack(tensors) for tensors in zip(*pooled, strict=True)))


def assert_nf4(shape, activation="none", bias=True):
    pooled = []
    for seed in range(3):
        inputs = nf4(*shape, torch.float32, bias, seed=seed)
        exact = plain_nf4(inputs, activation, torch.float64)
        pooled.append((nf4_linear(*inputs, activation), plain_nf4(inputs, activation, torch.float32), exact))
    assert_within_budget(f"nf4 {activation}", *(torch.stack(tensors) for tensors in zip(*pooled, strict=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", LAUNCHERS)
def test_quantised_shapes(dtype, shape, bias):
    assert_quantised(shape, dtype, bias=bias)


@pytest.mark.parametrize("tile", range(QUANTISED_TILES))
@pytest.mark.parametrize("dtype", LAUNCHERS)
def test_quantised_tiles(monkeypatch, dtype, tile):
    configs = quantised_configs(90, "none", 2)  # the interpreter has no bfloat16, and can run all tiles
    monkeypatch.setattr(triton_quantised, "choose", lambda _configs, rows, outputs: configs[tile])
    assert_quantised((35, 150, 272), dtype)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LAUNCHERS)
def test_quantised_activations(dtype, activation, out_dtype):
    assert_quantised((9, 40, 64), dtype, activation, out_dtype=out_dtype)


def test_int8_sums_are_exact():
    generator = torch.Generator().manual_seed(0)
    values, weight = (torch.randint(90, 128, (n, 4096), generator=generator, dtype=torch.int8) for n in (4, 8))
    ones, sums = torch.ones(8), values.long() @ weight.long().T
    assert sums.min() > 2**24  # and partial sums in float32 would round
    y = int8_linear(values, ones[:4], weight, ones, None, "none", torch.float32)
    assert torch.equal(y, sums.float())
    in_float32 = sum(a.float() @ b.float().T for a, b in zip(values.split(256, 1), weight.split(256, 1), strict=True))
    assert not torch.equal(in_float32, sums.float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_shapes(shape, bias):
    assert_nf4(shape, bias=bias)


@pytest.mark.parametrize("tile", range(NF4_TILES))
def test_nf4_tiles(monkeypatch, tile):
    half_precision = nf4_configs(2, 2)  # of which the interpreter can run the tiles, in float32
    monkeypatch.setattr(triton_unpacked, "choose", lambda configs, rows, outputs: half_precision[tile])
    assert_nf4((35, 150, 320))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nf4_activations(activation):
    assert_nf4((9, 40, 64), activation)


def test_nf4_numbers_are_the_quantiles():
    # QLoRA (Dettmers et al. 2023), appendix E: 8 positive and 7 negative quantiles of a normal distribution, and 0
    def quantiles(count):
        return torch.special.ndtri(torch.linspace(0.9677083, 0.5, count, dtype=torch.float64))[:-1]

    numbers = torch.cat((quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8))).sort().values
    torch.testing.assert_close(torch.tensor(NF4, dtype=torch.float64), numbers / numbers.max(), rtol=0, atol=3e-7)


def test_rows_may_be_strided():
    values, *rest = quantised(5, 20, 32, torch.int8)
    wide = torch.zeros(5, 48, dtype=torch.int8)
    wide[:, 7:39] = values
    expected = int8_linear(values, *rest, "none", torch.float32)
    assert torch.equal(int8_linear(wide[:, 7:39], *rest, "none", torch.float32), expected)
    x, *rest = nf4(5, 20, 64, torch.float32)
    wide = torch.cat((x, x), 1)
    assert torch.equal(nf4_linear(wide[:, 64:], *rest, "none"), nf4_linear(x, *rest, "none"))


def int8_weight(rows, outputs, depth, bias=True, seed=0):
    """x in float32, and the weight, its scale and bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=generator)
    return x, *quantised(rows, outputs, depth, torch.int8, bias, seed=seed)[2:]


def plain_int8_weight(inputs, activation, dtype):
    x, weight, scale, bias = (None if tensor is None else tensor.to(dtype) for tensor in inputs)
    return ACTIVATIONS[activation](x @ weight.T * scale + (0 if bias is None else bias))


def assert_int8_weight(shape, activation="none", bias=True):
    pooled = []
    for seed in range(3):
        inputs = int8_weight(*shape, bias, seed)
        ours, plain = int8_weight_linear(*inputs, activation), plain_int8_weight(inputs, activation, torch.float32)
        exact = plain_int8_weight(inputs, activation, torch.float64)
        # a sum in float32: one rounding of the largest partial sum at least
        x, weight, scale, _ = inputs
        rounding = x.abs() @ weight.abs().float().T * scale * torch.finfo(torch.float32).eps
        pooled.append((ours, plain, exact, rounding.double()))
    assert_within_budget(f"int8 weight {activation}", *(torch.stack(parts) for parts in zip(*pooled, strict=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weight_shapes(shape, bias):
    assert_int8_weight(shape, bias=bias)


@pytest.mark.parametrize("tile", range(INT8_WEIGHT_TILES))
def test_int8_weight_tiles(monkeypatch, tile):
    half_precision = int8_weight_configs(2, 2)
    monkeypatch.setattr(triton_unpacked, "choose", lambda configs, rows, outputs: half_precision[tile])
    assert_int8_weight((35, 150, 272))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_weight_activations(activation):
    assert_int8_weight((9, 40, 64), activation)


@pytest.mark.parametrize("depth", [1, 33, 70])
def test_any_depth_and_rows_that_are_filled_up(depth):
    """What stands behind the last input in a row of the weight is not read as one."""
    values, row_scale, weight, *rest = quantised(5, 20, depth, torch.int8)
    filled = torch.full((20, 128), 99, dtype=torch.int8)
    filled[:, :depth] = weight
    expected = int8_linear(values, row_scale, weight, *rest, "none", torch.float32)
    assert torch.equal(int8_linear(values, row_scale, filled[:, :depth], *rest, "none", torch.float32), expected)
    x, *layer = int8_weight(5, 20, depth)
    expected = plain_int8_weight((x, *layer), "none", torch.float64)
    ours = int8_weight_linear(x, filled[:, :depth], *layer[1:], "none")
    assert_within_budget("depth", ours, plain_int8_weight((x, *layer), "none", torch.float32), expected)
    x, codes, groups, *rest = nf4(5, 20, 128, torch.float32)
    whole = torch.cat((x[:, :depth], torch.zeros(5, 128 - depth)), 1)
    torch.testing.assert_close(
        nf4_linear(x[:, :depth], codes, groups, *rest, "none"), nf4_linear(whole, codes, groups, *rest, "none")
    )


GATED = {
    "int8": lambda act, gated: int8_linear(*quantised(9, 46, 64, torch.int8), act, torch.float32, gated),
    "fp8": lambda act, gated: fp8_linear(*quantised(9, 46, 64, FP8), act, torch.float32, gated),
    "nf4": lambda act, gated: nf4_linear(*nf4(9, 46, 64, torch.float32), act, gated=gated),
    "int8 weight": lambda act, gated: int8_weight_linear(*int8_weight(9, 46, 64), act, gated=gated),
    "pass": lambda act, gated: finished(
        torch.randn(9, 2300, generator=torch.Generator().manual_seed(0)),
        torch.linspace(-1, 1, 2300),
        act,
        torch.float32,
        gated,
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", GATED)
def test_gates(kernel, activation):
    plain = GATED[kernel]("none", False)  # neighbouring columns are a gate and what it gates
    gates, rest = plain[:, 0::2], plain[:, 1::2]
    exact = ACTIVATIONS[activation](gates.double()) * rest.double()
    ours = GATED[kernel](activation, True)
    assert ours.shape == (9, plain.shape[1] // 2)
    assert_within_budget(kernel, ours, ACTIVATIONS[activation](gates) * rest, exact, exact.abs().mean() * 1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (2, 2500)])
def test_the_pass_behind_a_product(shape, activation):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, shape[1])
    exact, plain = (ACTIVATIONS[activation](x.to(dtype) + bias.to(dtype)) for dtype in (torch.float64, torch.float32))
    given = x.clone()
    ours = finished(given, bias, activation, torch.float32)
    assert ours is given  # in the place of what it takes
    assert_within_budget(activation, ours, plain, exact)
    half = finished(x, None, activation, torch.float16)
    exact = ACTIVATIONS[activation](x.double())
    assert_within_budget(activation, half, ACTIVATIONS[activation](x).half(), exact)


@pytest.mark.parametrize("rows, outputs", [(0, 8), (3, 0)])
def test_empty(rows, outputs):
    for dtype, launcher in LAUNCHERS.items():
        y = launcher(*quantised(rows, outputs, 16, dtype), "gelu", torch.bfloat16)
        assert y.shape == (rows, outputs) and y.dtype == torch.bfloat16
    assert nf4_linear(*nf4(rows, outputs, 64, torch.float32), "gelu").shape == (rows, outputs)
    assert int8_weight_linear(*int8_weight(rows, outputs, 64), "gelu").shape == (rows, outputs)
    assert finished(torch.empty(rows, outputs), None, "gelu", torch.bfloat16).shape == (rows, outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay(activation):
    values, row_scale, weight, weight_scale, _ = quantised(3, 16, 16, torch.int8)
    bias = torch.zeros(16)
    bias[0], bias[1] = torch.nan, torch.inf
    y = int8_linear(values, row_scale, weight, weight_scale, bias, activation, torch.float32)
    assert y[:, 0].isnan().all() and (y[:, 1] == torch.inf).all() and y[:, 2:].isfinite().all()


def test_fp8_names_the_capability_it_needs(monkeypatch):
    monkeypatch.setattr(triton_quantised, "_capability", lambda device: 89)
    with pytest.raises(RuntimeError, match=r"capability 9\.0 or newer, and cpu has 8\.9: use precision='int8'"):
        fp8_linear(*quantised(2, 16, 16, FP8), "none", torch.float32)


def test_tiles_follow_the_shape():
    configs = quantised_configs(90, "none", 2)
    assert triton_tiles.choose(configs, 16384, 4096)["BLOCK_M"] == 256
    assert triton_tiles.choose(configs, 1, 14336)["BLOCK_M"] == 16
    for rows, outputs in ((1, 64), (800, 384), (2048, 768), (2048, 3072)):
        config = triton_tiles.choose(configs, rows, outputs)
        smaller = configs[configs.index(config) :]
        assert triton_tiles.programs(config, rows, outputs) >= 132 or len(smaller) == 1
        assert config["BLOCK_M"] < 2 * max(rows, 16)
