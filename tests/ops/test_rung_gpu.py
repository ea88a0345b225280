"""The rung on a GPU: Triton and CUDA kernels against float64, within PyTorch's own error there."""

from __future__ import annotations

import pytest
import torch

import tlfast
from tests.ops.rung_cases import assert_accurate, make, run
from tlfast.ops import rung

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

IMPLS = ["triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [((1,), 16, 16), ((2, 63), 100, 48), ((3, 1365), 768, 96), ((65,), 4096, 512), ((100,), 1, 1), ((), 63, 65)]


def cases(*args, **kwargs):
    return [make(*args, **kwargs, device="cuda", seed=seed) for seed in range(4)]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape, depth, width", SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_float32_accuracy(impl, shape, depth, width, per_channel):
    assert_accurate(cases(shape, depth, width, per_channel=per_channel), impl)


@pytest.mark.parametrize("width", [48, 96, 192, 512])
@pytest.mark.parametrize("s_dtype", DTYPES)
@pytest.mark.parametrize("h_dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_accuracy(impl, h_dtype, s_dtype, width):
    assert_accurate(cases((4, 300), 768, width, h_dtype, s_dtype, per_channel=True, bias=False), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl):
    torch.manual_seed(0)
    _, _, weight, bias, alpha = make((4, 6), 24, 10, per_channel=True, device="cuda")
    side = torch.randn(4, 6, 32, device="cuda")[..., 5:15].requires_grad_()
    dz = torch.randn(6, 4, 10, device="cuda").transpose(0, 1)
    columns, rows = torch.randn(4, 6, 60, device="cuda")[..., 7:31], torch.randn(4, 9, 24, device="cuda")[:, 2:8]
    views = [columns, rows, torch.randn(4, 24, 6, device="cuda").mT]
    assert not any(view.is_contiguous() for view in (*views, side, dz))
    assert_accurate([(view, side, weight, bias, alpha) for view in views], impl, dz)


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_beyond_32_bits(impl):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    _, s, weight, bias, alpha = make((3,), 64, 16, device="cuda")
    h = torch.zeros(2 * 2**30 + 64, dtype=torch.bfloat16, device="cuda").as_strided((3, 64), (2**30, 1))
    h.normal_()
    z, expected = (rung(x, s, weight, bias, alpha, impl=impl) for x in (h, h.clone()))
    assert torch.equal(z, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_on_the_current_stream(impl):
    inputs = make((64,), 768, 96, device="cuda")
    expected = run(inputs, impl)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(inputs[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read the tap before it is written
        late.copy_(inputs[0])
        result = run((late, *inputs[1:]), impl)
    stream.synchronize()
    for name in ("z", "ds"):
        assert torch.equal(result[name], expected[name]), name


def test_triton_gives_the_same_bits_every_time():
    inputs = make((3, 1365), 768, 96, torch.bfloat16, device="cuda")
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    h, s, weight, bias, alpha = (x.detach() for x in make((2, 5), 32, 16, torch.bfloat16, device="cuda"))
    torch.library.opcheck(torch.ops.tlfast.rung_fwd, (h, s, weight, bias, alpha, 0.1, impl))
    z = torch.ops.tlfast.rung_fwd(h, s, weight, bias, alpha, 0.1, impl)
    torch.library.opcheck(torch.ops.tlfast.rung_bwd, (torch.ones_like(z), h, s, z, alpha, 0.1, True, True, impl))


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_compiles_into_one_graph(impl):
    torch.compiler.reset()
    inputs = make((2, 50), 128, 48, device="cuda")

    @torch.compile(fullgraph=True)
    def layer(*inputs):
        return torch.tanh(rung(*inputs, impl=impl))

    ours = torch.autograd.grad(layer(*inputs).sum(), inputs[1:])
    eager = torch.autograd.grad(torch.tanh(rung(*inputs, impl="reference")).sum(), inputs[1:])
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_forward_allocates_only_its_output():
    inputs = make((8, 512), 768, 96, torch.bfloat16, device="cuda")
    bf16 = (inputs[0], inputs[1], inputs[2].detach().bfloat16().requires_grad_(), *inputs[3:])
    rung(*bf16, impl="triton")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    z = rung(*bf16, impl="triton")
    assert torch.cuda.max_memory_allocated() - before == z.numel() * z.element_size()


def test_auto_takes_triton():
    assert tlfast.ops.describe()["rung"]["auto"] == "triton"
    inputs = make((2, 5), 32, 16, torch.bfloat16, device="cuda")
    assert torch.equal(rung(*inputs), rung(*inputs, impl="triton"))


def test_native_refuses_cuda_tensors():
    inputs = make((2, 5), 32, 16, device="cuda")
    with pytest.raises(RuntimeError, match="it needs cpu tensors and was given cuda ones"):
        rung(*inputs, impl="native")
