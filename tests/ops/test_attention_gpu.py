"""Attention on a GPU: Triton kernels against float64, within PyTorch's own error there; nothing waits; CUDA graphs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

import tlfast
from tests.budget import assert_within_budget
from tests.ops.attention_cases import kept, make, rounded, run
from tlfast.ops import attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, Sq, Sk, H, Dh)
SHAPES = [(2, 63, 65, 3, 8), (1, 1, 1, 1, 1), (3, 300, 300, 2, 12), (2, 130, 520, 4, 32), (2, 513, 257, 2, 64)]
VARIANTS = {
    "plain": {},
    "mask": {"mask": True},
    "causal": {"causal": True},
    "causal-mask": {"mask": True, "causal": True},
}


def on_gpu(case):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in case]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def assert_accurate(case, dtype, **options):
    """Output and gradients within the error of the plain formula in the dtype, and what rounding the output costs."""
    case = on_gpu(rounded(case, dtype))
    exact = run(attention, case, torch.float64, impl="reference", **options)
    plain = run(attention, case, dtype, impl="reference", **options)
    numbers = [x for x in (*case, *exact) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    rounding = 2 * torch.finfo(dtype).eps * max(float(x.abs().max()) for x in numbers)
    ours = run(attention, case, dtype, impl="triton", **options)
    for name, a, b, e in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        assert_within_budget(name, a, b, e, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape, variant, dropout_p, dtype):
    assert_accurate(make(shape, **VARIANTS[variant]), dtype, dropout_p=dropout_p, seed=-7)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype, scale):
    assert_accurate(make((2, 130, 140, 3, 8), mask=True, causal=True), dtype, scale=scale)


def test_float32_follows_pytorchs_switch(monkeypatch):
    monkeypatch.setattr(importlib.import_module("tlfast.ops.attention.triton_tiles"), "precision", lambda: "tf32")
    case = on_gpu(make((2, 130, 140, 3, 32), causal=True))
    ours = run(attention, case, torch.float32, impl="triton")
    exact = run(attention, case, torch.float64, impl="reference")
    for a, e in zip(ours, exact, strict=True):
        error = float((a - e).abs().max() / e.abs().max())
        assert 1e-6 < error < 2**-8  # ten bits of significand, and sums


@pytest.mark.parametrize("impl", ["recompute", "reference"])
def test_the_dropout_mask_bit_for_bit(impl):
    """Values that are powers of two, one a key: the output tells every kept entry of the map."""
    keys = 20
    q = torch.zeros(3, 150, 2, 32, device="cuda")
    v = (torch.eye(32, device="cuda")[:keys] * 1.0)[None, :, None, :].expand(3, keys, 2, 32)
    k = torch.zeros(3, keys, 2, 32, device="cuda")
    kept_entries = [attention(q, k, v, dropout_p=0.6, seed=2**61 + 5, impl=name) > 0 for name in (impl, "triton")]
    assert torch.equal(*kept_entries)
    assert 0.35 < kept_entries[0][..., :keys].float().mean() < 0.45


def test_a_query_without_a_key():
    q, k, v, _, mask, _, dout = make((3, 200, 180, 2, 8), mask=True)
    mask[1] = False
    mask[2, :150] = False
    case = on_gpu((q, k, v, None, mask, True, dout))
    blind = ~(torch.ones(200, 180, dtype=torch.bool).tril(-20) & mask[:, None]).any(-1).cuda()
    out, dq, dk, dv = run(attention, case, torch.bfloat16, impl="triton", dropout_p=0.2, seed=1)
    assert out[blind].abs().max() == 0
    assert dq[blind].abs().max() == 0
    assert dk[1].abs().max() == 0
    assert dv[1].abs().max() == 0
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_what_a_masked_key_holds_does_not_matter():
    case = on_gpu(make((2, 150, 300, 2, 8), mask=True))
    expected = run(attention, case, torch.bfloat16, impl="triton")
    case[1][~case[4]], case[2][~case[4]] = torch.nan, torch.inf
    for a, b in zip(run(attention, case, torch.bfloat16, impl="triton"), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_views(dtype):
    packed = torch.randn(2, 150, 3, 4, 8, device="cuda", dtype=dtype)
    q, k, v = packed.unbind(2)
    views = [
        (q, k, v),
        (torch.randn(2, 4, 150, 8, device="cuda", dtype=dtype).transpose(1, 2), k, v),
        (q, torch.randn(2, 4, 8, 150, device="cuda", dtype=dtype).permute(0, 3, 1, 2), v),
        (q, k, torch.randn(1, 150, 1, 8, device="cuda", dtype=dtype).expand(2, 150, 4, 8)),
        tuple(x[..., 1:6] for x in (q, k, v)),  # of no alignment
    ]
    for view in views:
        a, b = (
            attention(*(convert(x) for x in view), causal=True, impl="triton") for convert in (lambda x: x, torch.clone)
        )
        assert torch.equal(a, b)
        assert torch.equal(a, attention(*(x.contiguous() for x in view), causal=True, impl="triton"))
        assert a.is_contiguous()


def test_the_same_bits_every_time():
    case = on_gpu(make((3, 700, 700, 4, 8), mask=True, causal=True))
    first, second = (run(attention, case, torch.bfloat16, impl="triton", dropout_p=0.1, seed=3) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    far = torch.zeros(2 * 2**30 + 2**21, dtype=torch.bfloat16, device="cuda")
    q, k, v = (far[i * 64 :].as_strided((2, 3, 2, 8), (2**20, 2**30, 8, 1)) for i in range(3))
    for x in (q, k, v):
        x.normal_()
    assert torch.equal(attention(q, k, v, impl="triton"), attention(*map(torch.clone, (q, k, v)), impl="triton"))


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_nothing_waits_for_the_gpu(where, waiting_is_an_error):
    q, k, v = torch.randn(2, 100, 3, 4, 8, device="cuda", requires_grad=True).unbind(2)
    seed = torch.full((), 12, device=where)
    mask = torch.ones(2, 100, dtype=torch.bool, device="cuda")
    attention(q, k, v, key_mask=mask, causal=True, dropout_p=0.1, seed=seed, impl="triton").sum().backward()


def test_a_cuda_graph_reads_the_seed_at_each_replay():
    q, k, v = (torch.randn(2, 100, 4, 8, device="cuda", requires_grad=True) for _ in range(3))
    seed = torch.full((), 12, device="cuda")

    def step(seed):
        out = attention(q, k, v, causal=True, dropout_p=0.3, seed=seed, impl="triton")
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled outside the capture
        step(seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seed)
    outputs = []
    for value in (12, 99):
        seed.fill_(value)
        graph.replay()
        for a, b in zip(captured, step(value), strict=True):
            assert torch.equal(a, b)
        outputs.append(captured[0].clone())
    assert not torch.equal(*outputs)


def test_kept_for_backward():
    batch, length, heads, width = 2, 256, 3, 8
    packed = torch.randn(batch, length, 3, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = packed.unbind(2)
    seed = torch.full((), 3, device="cuda")
    _, new, _ = kept(lambda: attention(q, k, v, causal=True, dropout_p=0.1, seed=seed, impl="triton"), (packed, seed))
    assert new == 2 * batch * length * heads * width + 4 * 2 * batch * heads * length  # out, two numbers a row


def test_opcheck():
    q, k, v = torch.randn(2, 9, 3, 2, 8, device="cuda", dtype=torch.bfloat16).unbind(2)
    settings = (True, 0.35, 0.1, torch.full((), 4, device="cuda"))
    inputs = (q, k, v, None, torch.rand(2, 9, device="cuda") > 0.2)
    torch.library.opcheck(torch.ops.tlfast.attention_fwd.default, (*inputs, *settings, "triton"))
    out, statistics = torch.ops.tlfast.attention_fwd(*inputs, *settings, "triton")
    backward = (torch.randn_like(out), *inputs, out, statistics, *settings, False, "triton")
    torch.library.opcheck(torch.ops.tlfast.attention_bwd.default, backward)


def test_compiles_into_one_graph():
    torch.compiler.reset()
    packed = torch.randn(2, 50, 3, 4, 8, device="cuda", requires_grad=True)

    def layer(packed, seed):
        return torch.tanh(attention(*packed.unbind(2), causal=True, dropout_p=0.1, seed=seed, impl="triton"))

    seed = torch.full((), 4, device="cuda")
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(packed, seed)
        expected = torch.tanh(attention(*packed.unbind(2), causal=True, dropout_p=0.1, seed=seed, impl="recompute"))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(y.square().sum(), packed)[0] for y in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_auto_takes_triton_where_it_can():
    assert tlfast.ops.describe()["attention"]["auto"] == "triton"
    q, k, v = torch.randn(2, 40, 3, 4, 8, device="cuda", dtype=torch.bfloat16).unbind(2)
    assert torch.equal(attention(q, k, v, causal=True), attention(q, k, v, causal=True, impl="triton"))
    q, k, v = torch.randn(2, 40, 3, 4, 128, device="cuda", dtype=torch.bfloat16).unbind(2)
    assert torch.equal(attention(q, k, v, causal=True), attention(q, k, v, causal=True, impl="sdpa"))
    with pytest.raises(RuntimeError, match="Dh up to 64, not 128"):
        attention(q, k, v, impl="triton")
