"""attention inside PyTorch's machinery: gradcheck, opcheck, compile, checkpoint, autocast; choice and refusals."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tlfast import ops
from tlfast.ops import _dispatch, attention
from tlfast.ops.attention import sdpa

from .attention_cases import IMPLS, LEAN, TRITON, kept, make, needs_native
from .interpreter import interpreted

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("impl", ["reference", "recompute"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gradcheck(impl, dropout_p):
    q, k, v, bias, mask, _, _ = make((2, 3, 4, 1, 2), bias=("1", "H", "Sq", "Sk"), mask=True)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    mask[0] = False

    def function(q, k, v, bias):
        return attention(q, k, v, bias=bias, key_mask=mask, causal=True, dropout_p=dropout_p, seed=11, impl=impl)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("impl", LEAN)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck(impl, dropout_p):
    q, k, v = torch.randn(2, 9, 3, 2, 8).unbind(2)
    bias, mask = torch.randn(1, 2, 9, 9), torch.rand(2, 9) > 0.2
    seed = torch.tensor(4) if dropout_p else None
    forward = (q, k, v, bias, mask, True, 0.35, dropout_p, seed, impl)
    torch.library.opcheck(torch.ops.tlfast.attention_fwd.default, forward)
    out, statistics = torch.ops.tlfast.attention_fwd(*forward)
    for given_bias, need in ((bias, True), (bias, False), (None, False)):
        backward = (
            torch.randn_like(out),
            q,
            k,
            v,
            given_bias,
            mask,
            out,
            statistics,
            True,
            0.35,
            dropout_p,
            seed,
            need,
            impl,
        )
        torch.library.opcheck(torch.ops.tlfast.attention_bwd.default, backward)


@interpreted
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_opcheck_of_triton(dropout_p):
    q, k, v = torch.randn(2, 9, 3, 2, 8).unbind(2)
    settings = (True, 0.35, dropout_p, torch.tensor(4) if dropout_p else None)
    inputs = (q, k, v, None, torch.rand(2, 9) > 0.2)
    torch.library.opcheck(torch.ops.tlfast.attention_fwd.default, (*inputs, *settings, "triton"))
    out, statistics = torch.ops.tlfast.attention_fwd(*inputs, *settings, "triton")
    backward = (torch.randn_like(out), *inputs, out, statistics, *settings, False, "triton")
    torch.library.opcheck(torch.ops.tlfast.attention_bwd.default, backward)


@pytest.mark.parametrize("impl", [*LEAN, TRITON])
def test_compiles_in_one_graph_with_the_seed_drawn_inside(impl):
    def step(packed, bias, mask):
        q, k, v = packed.unflatten(-1, (3, 2, 8)).unbind(2)
        seed = torch.randint(2**62, ())
        bias = None if impl == "triton" else bias
        return attention(q, k, v, bias=bias, key_mask=mask, dropout_p=0.2, seed=seed, impl=impl).flatten(2)

    packed, bias = torch.randn(2, 20, 48, requires_grad=True), torch.randn(1, 2, 20, 20, requires_grad=True)
    mask = torch.rand(2, 20) > 0.2
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        out = function(packed, bias, mask)
        wanted = (packed,) if impl == "triton" else (packed, bias)
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", [*LEAN, TRITON])
def test_checkpoint_repeats_the_mask(impl):
    packed = torch.randn(2, 20, 3, 2, 8, requires_grad=True)
    seed = torch.randint(2**62, ())

    def function(x):
        return attention(*x.unbind(2), dropout_p=0.3, seed=seed, impl=impl).square()

    (plain,) = torch.autograd.grad(function(packed).sum(), packed)
    recomputed = checkpoint(function, packed, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(plain, torch.autograd.grad(recomputed.sum(), packed)[0])


@pytest.mark.parametrize("impl", LEAN)
def test_autocast(impl):
    q, k, v = torch.randn(2, 20, 3, 2, 8).unbind(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, impl=impl)
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), impl=impl))
    assert out.dtype == torch.bfloat16


def test_auto_stays_lean_without_the_native_library(monkeypatch):
    q, k, v = torch.randn(2, 64, 3, 3, 8, requires_grad=True).unbind(2)
    monkeypatch.setitem(_dispatch.MISSING, "native", "blocked by a test")
    _, new, out = kept(lambda: attention(q, k, v, dropout_p=0.1, seed=1), (q,))
    assert new < 4 * 64 * 64 * 3
    assert torch.equal(out, attention(q, k, v, dropout_p=0.1, seed=1, impl="recompute"))
    with pytest.raises(RuntimeError, match="blocked by a test"):
        attention(q, k, v, impl="native")


def test_named_implementation_runs_or_raises():
    q, k, v = torch.randn(1, 4, 3, 2, 8).unbind(2)
    with pytest.raises(RuntimeError, match="sdpa"):
        attention(q, k, v, impl="sdpa")
    with pytest.raises(ValueError, match="'flash' is not one of attention's"):
        attention(q, k, v, impl="flash")
    assert set(ops.implementations("attention")) == set(IMPLS[:1]) | {"native", "triton", "sdpa", "recompute"}


@needs_native
def test_native_refuses_float64():
    q, k, v = torch.randn(1, 4, 3, 2, 8, dtype=torch.float64).unbind(2)
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        attention(q, k, v, impl="native")
    assert torch.equal(attention(q, k, v), attention(q, k, v, impl="recompute"))


@interpreted
def test_triton_refuses():
    q = torch.randn(1, 4, 2, 8)
    for message, given, options in (
        (r"not torch\.float64", q.double(), {}),
        ("computes bfloat16 wrongly", q.bfloat16(), {}),
        ("Dh up to 64, not 65", torch.randn(1, 4, 2, 65), {}),
        ("takes no bias", q, {"bias": torch.randn(1, 2, 4, 4)}),
    ):
        with pytest.raises(RuntimeError, match=message):
            attention(given, given, given, impl="triton", **options)


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        ("triton", {}),
        ("triton", {"key_mask": True, "causal": True, "dropout_p": 0.1, "seed": 1}),
        ("sdpa", {"width": 65}),
        ("sdpa", {"bias": True}),
        ("recompute", {"bias": True, "causal": True}),
        ("recompute", {"dtype": torch.float64}),
    ],
)
def test_auto_on_a_gpu(expected, change, monkeypatch):
    """What is picked for CUDA tensors, asked with tensors that are none."""
    monkeypatch.setattr(_dispatch, "MISSING", {})
    monkeypatch.setattr(_dispatch, "TRITON_INTERPRETED", False)
    monkeypatch.setitem(_dispatch.ORDER, "cpu", _dispatch.ORDER["cuda"])
    picked = []

    def remember(*arguments):
        picked.append(choose(*arguments))
        return "recompute"

    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", remember)
    q = torch.randn(1, 4, 2, change.get("width", 8), dtype=change.get("dtype", torch.bfloat16))
    tensors = {"bias": torch.randn(1, 2, 4, 4), "key_mask": torch.ones(1, 4, dtype=torch.bool)}
    options = {name: tensors.get(name, value) for name, value in change.items() if name not in ("width", "dtype")}
    attention(q, q, q, **options)
    assert picked == [expected]


def test_sdpa_refuses_what_would_keep_a_map():
    q = torch.randn(1, 4, 2, 8)
    bias, mask = torch.randn(1, 2, 4, 4), torch.ones(1, 4, dtype=torch.bool)
    assert sdpa.refuses(q, q, None, mask, False, 0.0) is None
    assert sdpa.refuses(q, q, bias, None, False, 0.0) is None
    assert sdpa.refuses(q, q, None, None, True, 0.0) is None
    assert "keep the map" in sdpa.refuses(q, q, bias.requires_grad_(), None, False, 0.0)
    assert "dropout mask" in sdpa.refuses(q, q, None, None, False, 0.1)
    assert "a map" in sdpa.refuses(q, q, bias.detach(), mask, False, 0.0)
    assert "Sq x Sk mask" in sdpa.refuses(q, q, None, mask, True, 0.0)
    assert "Sq x Sk mask" in sdpa.refuses(q, q[:, :3], None, None, True, 0.0)
    assert "float64" in sdpa.refuses(q.double(), q.double(), None, None, False, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(2, 5, 16)}, "q must be a floating-point tensor of 4 dimensions"),
        ({"q": [1.0]}, "q must be .* not list"),
        ({"k": torch.randn(2, 7, 2, 4)}, r"k must be \(2, 'Sk', 2, 8\)"),
        ({"v": torch.randn(2, 6, 2, 8)}, r"v must be \(2, 7, 2, 8\) as k is"),
        ({"v": torch.randn(2, 7, 2, 8).double()}, "v must have the dtype of q"),
        ({"q": torch.randn(2, 5, 2, 0), "k": torch.randn(2, 7, 2, 0), "v": torch.randn(2, 7, 2, 0)}, "at least one"),
        ({"bias": torch.randn(1, 2, 5, 6)}, r"bias must broadcast to .* \(2, 2, 5, 7\)"),
        ({"key_mask": torch.ones(2, 7)}, r"use mask.bool\(\)"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, r"key_mask must be \(B, Sk\) = \(2, 7\)"),
        ({"key_mask": torch.ones(2, 7, dtype=torch.bool, device="meta")}, "key_mask is on meta"),
        ({"k": torch.randn(2, 7, 2, 8, device="meta")}, "k is on meta"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"dropout_p": 1.0, "seed": 1}, r"dropout_p must be in \[0, 1\)"),
        ({"dropout_p": 0.1}, r"draw one with torch.randint\(2\*\*62, \(\)\)"),
        ({"dropout_p": 0.1, "seed": torch.tensor(1.0)}, "seed must be a 0-dim int64 tensor"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_bad_arguments(change, message):
    arguments = {"q": torch.randn(2, 5, 2, 8), "k": torch.randn(2, 7, 2, 8), "v": torch.randn(2, 7, 2, 8)} | change
    tensors = [arguments.pop(name) for name in "qkv"]
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **arguments)
