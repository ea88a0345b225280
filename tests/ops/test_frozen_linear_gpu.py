"""The frozen linear kernels on a GPU: against float64, within the error of PyTorch's own products there."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.budget import assert_within_budget
from tests.ops.linear_cases import ACTIVATIONS, nf4, plain_nf4, plain_quantised, quantised
from tlfast import ops
from tlfast.ops import FrozenWeight, frozen_linear
from tlfast.ops.frozen_linear.triton_quantised import fp8_linear, int8_linear
from tlfast.ops.frozen_linear.triton_unpacked import int8_weight_linear, nf4_linear

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

FP8 = torch.float8_e4m3fn
HALF = [torch.bfloat16, torch.float16]
# every tile is taken: tall and flat, few rows and many; odd rows and outputs
SHAPES = [(1, 4096, 4096), (16, 14336, 4096), (63, 1153, 784), (800, 384, 1536), (2048, 768, 768), (4099, 6144, 4096)]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no fp8 below capability 9.0"
)


@pytest.mark.parametrize("out_dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8(shape, out_dtype):
    inputs = quantised(*shape, torch.int8, device="cuda")
    exact = plain_quantised(inputs, "none", torch.float64, torch.float64)
    # a float32 product would round sums that are exact here: the formula in float64, rounded once, is the standard
    plain = exact.to(out_dtype)
    assert_within_budget("int8", int8_linear(*inputs, "none", out_dtype), plain, exact, 4 * rounding(exact))


@needs_fp8
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] % 16 == 0])
def test_fp8(shape):
    inputs = quantised(*shape, FP8, bias=False, device="cuda")
    values, row_scale, weight, weight_scale, _ = inputs
    plain = torch._scaled_mm(
        values,
        weight.T,
        scale_a=row_scale[:, None],
        scale_b=weight_scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    exact = plain_quantised(inputs, "none", torch.float64, torch.float64)
    assert_within_budget("fp8", fp8_linear(*inputs, "none", torch.bfloat16), plain, exact)


@needs_fp8
def test_fp8_odd_outputs():
    inputs = quantised(63, 1153, 784, FP8, device="cuda")
    even = [tensor if tensor.shape[0] == 63 else tensor[:1152] for tensor in inputs]
    y = fp8_linear(*inputs, "gelu", torch.float32)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y[:, :1152], fp8_linear(*even, "gelu", torch.float32))


# bfloat16 is what frozen_linear gives it on a GPU, and float16 it takes too; float32 is there for Triton's interpreter,
# which has no bfloat16: its single chain of sums errs more than cuBLAS' split ones
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [shape if shape[2] % 64 == 0 else (*shape[:2], 832) for shape in SHAPES])
def test_nf4(shape, dtype):
    inputs = nf4(*shape, dtype, device="cuda")
    ours, plain = nf4_linear(*inputs, "none"), plain_nf4(inputs, "none", dtype)
    assert_within_budget("nf4", ours, plain, plain_nf4(inputs, "none", torch.float64))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_activations(dtype, activation):
    inputs = quantised(300, 768, 384, torch.int8, device="cuda")
    exact = plain_quantised(inputs, activation, torch.float64, torch.float64)
    plain = plain_quantised(inputs, activation, dtype)
    assert_within_budget(f"int8 {activation}", int8_linear(*inputs, activation, dtype), plain, exact)
    inputs = nf4(300, 768, 384, dtype, device="cuda")
    exact = plain_nf4(inputs, activation, torch.float64)
    assert_within_budget(
        f"nf4 {activation}", nf4_linear(*inputs, activation), plain_nf4(inputs, activation, dtype), exact
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int8_weight_only", "nf4", "fp8"])
def test_the_whole_layer(precision, dtype, activation):
    """As it is prepared, called and moved: every stored precision, plain and gated, against its formula."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 products need compute capability 9.0")
    torch.manual_seed(0)
    weight, bias = torch.randn(330, 200, device="cuda") / 200**0.5, torch.randn(330, device="cuda")
    x = torch.randn(2, 75, 200, device="cuda").to(dtype)
    for layer in (
        FrozenWeight.of(weight, bias, precision),
        FrozenWeight.of_gated(weight, weight.flip(0), (bias, -bias), precision),
    ):
        assert layer.layout == "rows"
        exact = frozen_linear(x.float(), layer, activation, torch.float32, impl="reference").double()
        ours = frozen_linear(x, layer, activation)
        assert ours.dtype == dtype and torch.equal(ours, frozen_linear(x, layer, activation, impl="triton"))
        # cuBLAS rounds sums to bfloat16 before the activation, others weights or products of scales, one rounding each
        rounding = 4 * torch.finfo(torch.bfloat16).eps * (1 + exact.abs().amax())
        assert_within_budget(precision, ours, exact.to(dtype), exact, rounding)
    assert ops.implementations("frozen_linear")["triton"] == "available"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_weight(shape, dtype):
    x = torch.randn(shape[0], shape[2], device="cuda").to(dtype)
    _, _, weight, scale, bias = quantised(1, shape[1], shape[2], torch.int8, device="cuda")
    exact = x.double() @ weight.double().T * scale.double() + bias.double()
    plain = torch.nn.functional.linear(x, (weight.float() * scale[:, None]).to(dtype), bias.to(dtype))
    assert_within_budget("int8 weight", int8_weight_linear(x, weight, scale, bias, "none"), plain, exact)


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    rows, depth = 2**17 + 8, 2**15
    values = torch.zeros(rows, depth, dtype=torch.int8, device="cuda")
    values[-1] = 1
    weight, ones = torch.ones(16, depth, dtype=torch.int8, device="cuda"), torch.ones(rows, device="cuda")
    y = int8_linear(values, ones, weight, ones[:16], None, "none", torch.float32)
    assert not y[:-1].any() and (y[-1] == depth).all()


def test_same_bits_every_time():
    inputs = nf4(16, 4096, 4096, torch.bfloat16, device="cuda")
    assert torch.equal(nf4_linear(*inputs, "gelu"), nf4_linear(*inputs, "gelu"))


def rounding(exact: torch.Tensor) -> torch.Tensor:
    """One rounding to float32, which happens four times: the sum, two scales and the bias."""
    return exact.abs() * torch.finfo(torch.float32).eps
