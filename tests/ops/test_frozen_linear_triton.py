"""The frozen linear kernels under Triton's interpreter: against float64, within the error of PyTorch's own float32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.budget import assert_within_budget
from tests.ops.interpreter import interpreted
from tests.ops.linear_cases import ACTIVATIONS, nf4, plain_nf4, plain_quantised, quantised
from tlfast.ops.frozen_linear import triton as kernels
from tlfast.ops.frozen_linear.formats import NF4

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]

FP8 = torch.float8_e4m3fn
LAUNCHERS = {torch.int8: kernels.int8_linear, FP8: kernels.fp8_linear}
SHAPES = [(1, 37, 16), (63, 100, 272), (65, 1, 144), (7, 130, 400)]
NF4_SHAPES = [(1, 37, 64), (63, 100, 320), (65, 1, 128), (7, 130, 448)]
QUANTISED_TILES = len(kernels.quantised_configs(90, "none", 2))
NF4_TILES = len(kernels.nf4_configs(2))


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
        pooled.append((kernels.nf4_linear(*inputs, activation), plain_nf4(inputs, activation, torch.float32), exact))
    assert_within_budget(f"nf4 {activation}", *(torch.stack(tensors) for tensors in zip(*pooled, strict=True)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", LAUNCHERS)
def test_quantised_shapes(dtype, shape, bias):
    assert_quantised(shape, dtype, bias=bias)


@pytest.mark.parametrize("tile", range(QUANTISED_TILES))
@pytest.mark.parametrize("dtype", LAUNCHERS)
def test_quantised_tiles(monkeypatch, dtype, tile):
    configs = kernels.quantised_configs(90, "none", 2)  # the interpreter has no bfloat16, and can run all tiles
    monkeypatch.setattr(kernels, "choose", lambda _configs, rows, outputs: configs[tile])
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
    y = kernels.int8_linear(values, ones[:4], weight, ones, None, "none", torch.float32)
    assert torch.equal(y, sums.float())
    in_float32 = sum(a.float() @ b.float().T for a, b in zip(values.split(256, 1), weight.split(256, 1), strict=True))
    assert not torch.equal(in_float32, sums.float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_shapes(shape, bias):
    assert_nf4(shape, bias=bias)


@pytest.mark.parametrize("tile", range(NF4_TILES))
def test_nf4_tiles(monkeypatch, tile):
    half_precision = kernels.nf4_configs(2)  # of which the interpreter can run the tiles, in float32
    monkeypatch.setattr(kernels, "choose", lambda configs, rows, outputs: half_precision[tile])
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
    expected = kernels.int8_linear(values, *rest, "none", torch.float32)
    assert torch.equal(kernels.int8_linear(wide[:, 7:39], *rest, "none", torch.float32), expected)
    x, *rest = nf4(5, 20, 64, torch.float32)
    wide = torch.cat((x, x), 1)
    assert torch.equal(kernels.nf4_linear(wide[:, 64:], *rest, "none"), kernels.nf4_linear(x, *rest, "none"))


@pytest.mark.parametrize("rows, outputs", [(0, 8), (3, 0)])
def test_empty(rows, outputs):
    for dtype, launcher in LAUNCHERS.items():
        y = launcher(*quantised(rows, outputs, 16, dtype), "gelu", torch.bfloat16)
        assert y.shape == (rows, outputs) and y.dtype == torch.bfloat16
    assert kernels.nf4_linear(*nf4(rows, outputs, 64, torch.float32), "gelu").shape == (rows, outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay(activation):
    values, row_scale, weight, weight_scale, _ = quantised(3, 16, 16, torch.int8)
    bias = torch.zeros(16)
    bias[0], bias[1] = torch.nan, torch.inf
    y = kernels.int8_linear(values, row_scale, weight, weight_scale, bias, activation, torch.float32)
    assert y[:, 0].isnan().all() and (y[:, 1] == torch.inf).all() and y[:, 2:].isfinite().all()


def test_fp8_names_the_capability_it_needs(monkeypatch):
    monkeypatch.setattr(kernels, "_capability", lambda device: 89)
    with pytest.raises(RuntimeError, match=r"capability 9\.0 or newer, and cpu has 8\.9: use precision='int8'"):
        kernels.fp8_linear(*quantised(2, 16, 16, FP8), "none", torch.float32)


def test_tiles_follow_the_shape():
    configs = kernels.quantised_configs(90, "none", 2)
    assert kernels.choose(configs, 16384, 4096)["BLOCK_M"] == 256
    assert kernels.choose(configs, 1, 14336)["BLOCK_M"] == 16
    for rows, outputs in ((1, 64), (800, 384), (2048, 768), (2048, 3072)):
        config = kernels.choose(configs, rows, outputs)
        smaller = configs[configs.index(config) :]
        assert kernels.programs(config, rows, outputs) >= 132 or len(smaller) == 1
        assert config["BLOCK_M"] < 2 * max(rows, 16)
