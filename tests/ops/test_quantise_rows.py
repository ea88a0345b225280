"""quantise_rows: values and scales against float64, what cannot be told, PyTorch's machinery."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.interpreter import interpreted
from tests.ops.norm_cases import needs_native
from tlfast import ops
from tlfast.ops import _dispatch, quantise_rows

FLOAT8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FLOAT8: 448.0}
# each with the dtypes of x and of the values that it takes on a CPU
IMPLS = ["reference", pytest.param("native", marks=needs_native), pytest.param("triton", marks=interpreted)]
RUNS = [
    *(("reference", x, q) for x in (torch.float32, torch.bfloat16, torch.float16) for q in (torch.int8, FLOAT8)),
    *(
        pytest.param("native", x, torch.int8, marks=needs_native)
        for x in (torch.float32, torch.bfloat16, torch.float16)
    ),
    *(pytest.param("triton", x, torch.int8, marks=interpreted) for x in (torch.float32, torch.float16)),
]
SHAPES = [(1, 1), (2, 63), (3, 5, 65), (100,), (17, 100), (33, 768), (2, 5000)]


def make(shape, dtype, smooth=True):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.tensor(10.0).pow(torch.randn(*shape[:-1], 1))).to(dtype)
    return x, torch.rand(shape[-1]) + 0.5 if smooth else None


def check(x, smooth, dtype, impl):
    """A value is the nearest one to x * smooth / scale, but for the roundings of that in float32."""
    values, scale = quantise_rows(x, smooth, dtype, impl=impl)
    assert values.dtype == dtype and values.shape == x.shape and values.is_contiguous()
    assert scale.dtype == torch.float32 and scale.shape == x.shape[:-1]
    exact = x.double() if smooth is None else x.double() * smooth.double()
    exact_scale = exact.abs().amax(-1) / LARGEST[dtype]
    eps = torch.finfo(torch.float32).eps
    assert torch.all((scale.double() - exact_scale).abs() <= 1.5 * eps * exact_scale)  # a product and a quotient
    wanted = exact / exact_scale.unsqueeze(-1)
    # half a step: 1 for int8; a float8 has 3 bits of mantissa, and steps of 2^-9 near 0
    half = 0.5 if dtype == torch.int8 else wanted.abs().mul(2**-4).clamp_min(2**-10)
    assert torch.all((values.double() - wanted).abs() <= half + 2 * eps * wanted.abs())
    assert (values.double().abs().amax(-1) == LARGEST[dtype]).all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl, x_dtype, dtype", RUNS)
def test_values_and_scales(impl, x_dtype, dtype, shape, smooth):
    check(*make(shape, x_dtype, smooth), dtype, impl)


@needs_native
@pytest.mark.usefixtures("poisoned", "two_threads")
@given(rows=st.integers(1, 300), width=st.integers(1, 150), smooth=st.booleans())
def test_native_on_any_shape(rows, width, smooth):
    check(*make((rows, width), torch.bfloat16, smooth), torch.int8, "native")


@pytest.mark.usefixtures("poisoned", "two_threads")
@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("smooth", [False, True])
def test_bits_are_those_of_the_reference(impl, smooth):
    x, factors = make((64, 1000), torch.float32, smooth)
    for ours, plain in zip(
        quantise_rows(x, factors, impl=impl), quantise_rows(x, factors, impl="reference"), strict=True
    ):
        assert torch.equal(ours, plain)


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3"])
def test_every_instruction_set_gives_the_same_bits(isa, fresh_process):
    code = (
        "import torch, tlfast\n"
        "torch.manual_seed(0); x, smooth = torch.randn(64, 1003), torch.rand(1003)\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    values, scale = tlfast.ops.quantise_rows(x.to(dtype), smooth, impl='native')\n"
        "    print(hash(values.numpy().tobytes()), hash(scale.numpy().tobytes()))\n"
    )
    assert fresh_process(code, PYTHONHASHSEED="0", TLFAST_CPU_ISA=isa) == fresh_process(code, PYTHONHASHSEED="0")


@pytest.mark.parametrize("impl", IMPLS)
def test_halves_go_to_the_even_number(impl):
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5, 125.5, 126.5, -126.5, 0.49, 0.51]])
    values, scale = quantise_rows(x, impl=impl)
    assert scale.item() == 1
    assert values.tolist() == [[127, 0, 2, 0, -2, 2, 126, 126, -126, 0, 1]]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("impl, x_dtype, dtype", [run for run in RUNS if torch.float32 in getattr(run, "values", run)])
def test_what_cannot_be_told_stays_in_its_row(impl, x_dtype, dtype):
    x = torch.randn(6, 40, dtype=x_dtype)
    plain_values, plain_scale = quantise_rows(x, None, dtype, impl=impl)
    x[0, 3], x[2, 39], x[3], x[4] = torch.nan, -torch.inf, 0, x[4] * 1e-37
    x[2, 0] = torch.inf
    values, scale = quantise_rows(x, None, dtype, impl=impl)
    assert scale[0].isnan() and scale[2] == torch.inf and scale[3] == scale[4] == 0
    assert not values[[0, 2, 3, 4]].float().any()
    for row in (1, 5):
        assert torch.equal(values[row].float(), plain_values[row].float()) and scale[row] == plain_scale[row]
    x[2, 5] = -torch.nan  # beside an infinity
    assert quantise_rows(x, None, dtype, impl=impl)[1][2].isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl):
    wide, smooth = torch.randn(6, 4, 60), torch.rand(40)[::2]
    views = wide[..., 20:40], wide[:, 1:3, :20], wide.transpose(0, 1)[..., 40:], torch.randn(6, 20, 4).mT
    for view in (*views, wide[:, 1, 20:40]):
        assert not view.is_contiguous()
        expected = quantise_rows(view.contiguous(), smooth.contiguous(), impl=impl)
        for ours, dense in zip(quantise_rows(view, smooth, impl=impl), expected, strict=True):
            assert torch.equal(ours, dense)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl, shape):
    values, scale = quantise_rows(torch.zeros(shape), impl=impl)
    assert values.shape == shape and scale.shape == shape[:-1]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    for smooth in (None, torch.rand(12)):
        torch.library.opcheck(
            torch.ops.tlfast.quantise_rows.default, (torch.randn(2, 5, 12).to(dtype), smooth, torch.int8, "native")
        )


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiles_into_one_graph(impl):
    x = torch.randn(5, 24)
    compiled = torch.compile(lambda x: quantise_rows(x * 2, impl=impl), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x), quantise_rows(x * 2, impl=impl), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, ["x", "int64", "float32"]),
        ({"x": None}, ["x", "NoneType"]),
        ({"x": torch.zeros(())}, ["x", "(..., D)", "()"]),
        ({"x": torch.zeros(2, 0)}, ["x", "D >= 1", "(2, 0)"]),
        ({"x": torch.zeros(2, 3, requires_grad=True)}, ["x", "gradient", "no_grad"]),
        ({"smooth": torch.zeros(4)}, ["smooth", "(3,)", "(4,)"]),
        ({"smooth": torch.zeros(3).bfloat16()}, ["smooth", "float32", "bfloat16", "float()"]),
        ({"smooth": torch.zeros(3, device="meta")}, ["smooth", "meta", "cpu"]),
        ({"dtype": torch.uint8}, ["dtype", "uint8", "int8", "float8_e4m3fn"]),
        ({"impl": "fast"}, ["impl='fast'", "quantise_rows", "native"]),
    ],
)
def test_misuse(change, words):
    with pytest.raises(ValueError) as error:
        quantise_rows(**{"x": torch.zeros(2, 3), "smooth": torch.zeros(3), **change})
    for word in words:
        assert word in str(error.value)


def test_a_named_implementation_never_falls_back():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*float64.*reference"):
        quantise_rows(x.double(), impl="native")
    with pytest.raises(RuntimeError, match=r"impl='native' cannot run: .*int8.*float8_e4m3fn"):
        quantise_rows(x, dtype=FLOAT8, impl="native")
    assert quantise_rows(x.double())[1].dtype == torch.float64
    assert quantise_rows(x, dtype=FLOAT8)[0].dtype == FLOAT8
    assert set(ops.implementations("quantise_rows")) == {"reference", "native", "triton"}


@interpreted
def test_what_the_interpreter_computes_wrongly_is_refused():
    for x, dtype in ((torch.randn(2, 3).bfloat16(), torch.int8), (torch.randn(2, 3), FLOAT8)):
        with pytest.raises(RuntimeError, match="interpreter computes bfloat16 and float8 wrongly"):
            quantise_rows(x, None, dtype, impl="triton")


@needs_native
def test_auto_takes_native_without_a_graph(monkeypatch):
    taken = []
    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda *args: taken.append(choose(*args)) or taken[-1])
    with torch.no_grad():
        quantise_rows(torch.randn(2, 3, requires_grad=True))
    assert taken == ["native"]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(x_dtype, dtype, shape, smooth):
    if dtype == FLOAT8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    x, factors = make(shape, x_dtype, smooth)
    check(x.cuda(), None if factors is None else factors.cuda(), dtype, "triton")
