"""packed_attention: against PyTorch in float64, one sequence at a time; masks, bias, rotation, views, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tlfast import _native, ops
from tlfast.ops import _dispatch, packed_attention
from tlfast.ops.packed_attention import varlen

from ..budget import assert_within_budget
from .interpreter import interpreted

pytestmark = [pytest.mark.usefixtures("poisoned", "two_threads")]
needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
IMPLS = ["reference", pytest.param("native", marks=needs_native), "buckets"]
LENGTHS = (1, 63, 0, 65, 130, 63, 512)
HALVES = (torch.bfloat16, torch.float16)


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


def make(lengths, heads=2, kv_heads=2, head_dim=20, lengths_k=None, bias=False, rotation=False, seed=0, **options):
    """q, k, v as views of one fused projection, in float64, and the other arguments."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = sum(lengths)
    if lengths_k is None:
        q, k, v = draw(tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    else:
        q = draw(tokens, heads, head_dim)
        k, v = draw(sum(lengths_k), 2 * kv_heads, head_dim).chunk(2, dim=1)
        options["cu_seqlens_k"] = offsets(lengths_k)
    if bias:
        options["bias"] = draw(heads, max(lengths), max(lengths_k or lengths))
    if rotation:
        angles = draw(tokens, head_dim // 2).repeat(1, 2) * 3
        options["rotation"] = (angles.cos(), angles.sin())
    return (q, k, v, offsets(lengths)), options


def rounded(case, dtype):
    """The case as it looks in a dtype, so that rounding the inputs is nobody's error; bias and rotation are float32."""
    (q, k, v, starts), options = case
    options = dict(options)
    if "bias" in options:
        options["bias"] = options["bias"].float().double()
    if "rotation" in options:
        options["rotation"] = tuple(part.float().double() for part in options["rotation"])
    return (*(x.to(dtype).double() for x in (q, k, v)), starts), options


def ours(case, dtype, impl, **more):
    (q, k, v, starts), options = case
    options = dict(options) | more
    if "bias" in options:
        options["bias"] = options["bias"].float()
    if "rotation" in options:
        options["rotation"] = tuple(part.float() for part in options["rotation"])
    with torch.no_grad():
        return packed_attention(*(x.to(dtype) for x in (q, k, v)), starts, **options, impl=impl)


def rotate(x, rotation):
    """As a rotary model does it in the dtype of its tensors."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = (part.to(x.dtype)[:, None] for part in rotation)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def pytorch(case, dtype):
    """scaled_dot_product_attention of one sequence after the other; a query that sees no key gives zeros."""
    (q, k, v, starts), options = case
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if "rotation" in options:
        q, k = rotate(q, options["rotation"]), rotate(k, options["rotation"])
    out = torch.zeros_like(q)
    starts_k = options.get("cu_seqlens_k", starts)
    for (first, end), (first_k, end_k) in zip(pairwise(starts), pairwise(starts_k), strict=True):
        queries, keys = end - first, end_k - first_k
        if not queries or not keys:
            continue
        i, j = torch.arange(queries)[:, None], torch.arange(keys)
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if options.get("causal"):
            seen &= j <= i + keys - queries
        if options.get("window") is not None:
            seen &= (i - j).abs() <= options["window"]
        mask = torch.zeros(queries, keys, dtype=dtype).masked_fill(~seen, -torch.inf)
        if "bias" in options:
            mask = options["bias"][:, :queries, :keys].to(dtype) + mask
        one, many, values = (
            x[a:b].transpose(0, 1)[None]
            for x, a, b in zip((q, k, v), (first, first_k, first_k), (end, end_k, end_k), strict=True)
        )
        group = q.shape[1] // k.shape[1]
        many, values = (x.repeat_interleave(group, dim=1) for x in (many, values))
        attended = F.scaled_dot_product_attention(one, many, values, attn_mask=mask, scale=options.get("scale"))
        out[first:end] = torch.where(seen.any(-1)[:, None], attended[0], 0).transpose(0, 1)
    return out


def check(case, dtype, impl):
    case = rounded(case, dtype)
    exact, plain = pytorch(case, torch.float64), pytorch(case, dtype)
    assert_within_budget(f"{impl} {dtype}", ours(case, dtype, impl), plain, exact)


VARIANTS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 33},
    "narrow": {"window": 0},
    "causal-window": {"causal": True, "window": 17},
    "bias": {"bias": True},
    "bias-causal-window": {"bias": True, "causal": True, "window": 100},
    "rotation": {"rotation": True},
    "grouped": {"heads": 6, "kv_heads": 2, "causal": True, "rotation": True},
    "one-kv-head": {"heads": 3, "kv_heads": 1, "bias": True},
    "scale": {"scale": 1.0},
    "cross": {"lengths_k": (30, 0, 7, 65, 300, 1, 40)},
    "cross-causal": {"lengths_k": (30, 0, 7, 65, 300, 1, 40), "causal": True},
    "cross-window": {"lengths_k": (30, 0, 7, 65, 300, 1, 40), "window": 20, "bias": True},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values(variant, dtype, impl):
    check(make(LENGTHS, **VARIANTS[variant]), dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [1, 8, 20, 64, 80, 128])
def test_head_sizes(head_dim, dtype, impl):
    check(make((1, 63, 65, 130), head_dim=head_dim, causal=True, rotation=head_dim % 2 == 0), dtype, impl)


@needs_native
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 20).map(lambda half: 2 * half),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 100),
    bias=st.booleans(),
    rotation=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_lengths(lengths, kv_heads, group, head_dim, causal, window, bias, rotation, dtype):
    options = {"causal": causal, "window": window, "bias": bias, "rotation": rotation}
    check(make(lengths, kv_heads * group, kv_heads, head_dim, seed=sum(lengths), **options), dtype, "native")


@needs_native
@settings(max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=1, max_size=5),
    causal=st.booleans(),
    window=st.none() | st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_cross_lengths(lengths, causal, window, dtype):
    queries, keys = zip(*lengths, strict=True)
    check(make(queries, lengths_k=keys, causal=causal, window=window), dtype, "native")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_need_no_copy_and_give_the_same(dtype, impl):
    (q, k, v, starts), options = make((40, 3, 70), heads=4, kv_heads=2, head_dim=32, bias=True)
    assert not q.is_contiguous()
    expected = ours(((q.contiguous(), k.contiguous(), v.contiguous(), starts), options), dtype, impl)
    q, k, v = torch.cat((q, k, v), dim=1).to(dtype).split((4, 2, 2), dim=1)
    assert torch.equal(ours(((q, k, v, starts), options), dtype, impl), expected)
    columns = [x.permute(0, 2, 1).contiguous().permute(0, 2, 1) for x in (q, k, v)]  # neighbouring channels far apart
    turned = options | {"bias": options["bias"].transpose(1, 2).contiguous().transpose(1, 2)}
    found = ours(((*columns, starts), turned), dtype, impl)
    assert found.is_contiguous()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_nan_stays_in_its_sequence_and_shows(broken, dtype, impl):
    (q, k, v, starts), _ = make((20, 33, 40))
    expected = ours(((q, k, v, starts), {}), dtype, impl)
    (q, k, v)[broken][25, 1, 3] = torch.nan
    out = ours(((q, k, v, starts), {}), dtype, impl)
    assert torch.equal(out[:20], expected[:20])
    assert torch.equal(out[53:], expected[53:])
    assert out[25, 1].isnan().any()
    assert torch.equal(out[20:53, 0], expected[20:53, 0])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl):
    (q, k, v, starts), options = make((50, 70), head_dim=16)
    case = ((q * 100, k * 100, v, starts), options)
    for dtype in (torch.float32, torch.bfloat16):
        check(case, dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_nothing_to_attend(lengths, impl):
    case = make(lengths)
    assert ours(case, torch.float32, impl).shape == (0, 2, 20)
    queries = make((5, 3), lengths_k=(0, 0))
    assert ours(queries, torch.bfloat16, impl).abs().max() == 0


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    case = make((700, 3, 40), heads=2, kv_heads=1, window=300)
    results = []
    for threads in (1, 2, 5, 40):
        torch.set_num_threads(threads)
        results.append(ours(case, dtype, "native"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4", "vnni"])
def test_every_instruction_set(isa):
    """The tests of values once more, in a process that uses an older instruction set."""
    selected = [f"{__file__}::{name}" for name in ("test_values", "test_head_sizes")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", *selected]
    environment = os.environ | {"TLFAST_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    (q, k, v, starts), options = make((9, 4), bias=True, rotation=True)
    q, k, v, bias, cosines, sines = (x.float() for x in (q, k, v, options["bias"], *options["rotation"]))
    for arguments in (
        (q, k, v, starts, starts, 0.3, True, 5, bias, cosines, sines, None, None, impl),
        (q, k, v, starts, starts, 0.3, False, None, None, None, None, starts, starts, impl),
    ):
        torch.library.opcheck(torch.ops.tlfast.packed_attention.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grad", [True, False])
def test_compiles_in_one_graph(grad, impl):
    def step(fused, starts):
        q, k, v = fused.unflatten(-1, (6, 20)).split((2, 2, 2), dim=1)
        return packed_attention(q, k, v, starts, causal=True, impl=impl).flatten(1) * 2

    fused, starts = torch.randn(33, 120), offsets((20, 13))
    with torch.set_grad_enabled(grad):
        expected = step(fused, starts)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(fused, starts), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    case = make((20, 33), causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ours(case, torch.float32, impl)
    assert torch.equal(inside, ours(case, torch.float32, impl))


def test_choice(monkeypatch):
    expected = {
        "reference": "available",
        "native": _dispatch.MISSING.get("native", "available"),
        "varlen": "available" if torch.cuda.is_available() else "no CUDA device",
        "buckets": "available",
    }
    assert ops.implementations("packed_attention") == expected
    names = tuple(expected)
    monkeypatch.setattr(_dispatch, "MISSING", {})
    for device, first in (("cpu", "native"), ("cuda", "varlen"), ("mps", "buckets")):
        assert _dispatch.choose("packed_attention", "auto", names, device, lambda name: None) == first
    monkeypatch.setattr(_dispatch, "MISSING", {"native": "broken"})
    assert _dispatch.choose("packed_attention", "auto", names, "cpu", lambda name: None) == "buckets"


def flash(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, _debug, *, scale, **windows):
    """PyTorch's flash attention as FlashAttention-2 defines it: causal and windows are aligned at the last key."""
    assert dropout == 0.0 and starts.device == q.device and starts_k.device == q.device
    assert longest == int(starts.diff().max()) and longest_k == int(starts_k.diff().max())
    left, right = windows.get("window_size_left", -1), windows.get("window_size_right", -1)
    right = 0 if causal else right
    out = torch.zeros_like(q)
    for (first, end), (first_k, end_k) in zip(pairwise(starts.tolist()), pairwise(starts_k.tolist()), strict=True):
        queries, keys = end - first, end_k - first_k
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
        seen = (distance >= -left) | (left < 0)
        seen &= (distance <= right) | (right < 0)
        one, many, values = (
            x[a:b].transpose(0, 1) for x, a, b in ((q, first, end), (k, first_k, end_k), (v, first_k, end_k))
        )
        many, values = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in (many, values))
        attended = F.scaled_dot_product_attention(one, many, values, attn_mask=seen, scale=scale)
        out[first:end] = torch.where(seen.any(-1)[:, None], attended, 0).transpose(0, 1)
    return out, None, None, None, None


FLASH = ("plain", "causal", "window", "narrow", "causal-window", "grouped", "scale", "cross", "cross-causal")
SHORT = (1, 9, 0, 5, 12, 9, 33)


@interpreted
@pytest.mark.parametrize("placed", [True, False])
@pytest.mark.parametrize("variant", FLASH)
def test_varlen_asks_for_what_it_means(variant, placed, monkeypatch):
    """What PyTorch's operator, which needs a GPU, is asked for: its definition stands in its place, in float32."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32,))
    monkeypatch.setattr(_dispatch, "_OF_CUDA", ())
    (q, k, v, starts), options = make(SHORT, head_dim=8, **VARIANTS[variant])
    if placed:
        options["on_device"] = starts.clone(), options.get("cu_seqlens_k", starts).clone()
    check(((q, k, v, starts), options), torch.float32, "varlen")


def test_varlen_refuses_what_it_cannot_take():
    def refusal(head_dim=64, dtype=torch.bfloat16, window=None, bias=None, crosses=False):
        return varlen.refuses(torch.zeros(3, 2, head_dim, dtype=dtype), window, bias, crosses, False)

    assert refusal() is None and refusal(window=3) is None and refusal(crosses=True) is None
    assert "bfloat16 and float16, not torch.float32; use impl='buckets'" in refusal(dtype=torch.float32)
    assert "channels, not 20; use impl='buckets'" in refusal(20)
    assert "channels, not 264; use impl='buckets'" in refusal(264)
    assert "no bias" in refusal(bias=zeros(2, 3, 3))
    assert "count from the last key" in refusal(window=3, crosses=True)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"varlen.*needs cuda tensors"):
            ours(make((5, 3), head_dim=8), torch.bfloat16, "varlen")


@interpreted
@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 24), (5, 64), (33, 128)])
def test_rotation_in_one_pass(heads, head_dim):
    from tlfast.ops.packed_attention.triton_rotate import rotate as rotated

    (q, k, _, _), options = make((7, 4), heads, 1, head_dim, rotation=True)
    rotation = [part.float() for part in options["rotation"]]
    x = torch.cat((q, k), 1).float()[:, :heads]
    assert not x.is_contiguous()
    exact = rotate(x.double(), [part.double() for part in rotation])
    assert_within_budget("rotation", rotated(x, *rotation), rotate(x, rotation), exact)
    assert rotated(x[:0], *(part[:0] for part in rotation)).shape == (0, heads, head_dim)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("impl", ["varlen", "buckets"])
@pytest.mark.parametrize("variant", FLASH)
def test_on_a_gpu(variant, impl, head_dim, dtype):
    case = rounded(make(LENGTHS, head_dim=head_dim, **VARIANTS[variant]), dtype)
    exact, plain = pytorch(case, torch.float64), pytorch(case, dtype)
    (q, k, v, starts), options = case
    moved = {name: to_gpu(value) for name, value in options.items()}
    found = ours(((q.cuda(), k.cuda(), v.cuda(), starts), moved), dtype, impl)
    # flash attention also rounds its probabilities, of at most 1, to the dtype
    rounding = torch.finfo(dtype).eps * v.abs().max()
    assert_within_budget(f"{impl} {dtype}", found.cpu(), plain, exact, rounding)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    (q, k, v, starts), options = make((40, 7, 70), head_dim=64, rotation=True, causal=True)
    moved = {name: to_gpu(value) for name, value in options.items()}
    case = (q.cuda(), k.cuda(), v.cuda(), starts), moved | {"on_device": (starts.cuda(), starts.cuda())}
    expected = ours(case, torch.bfloat16, "varlen")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ours(case, torch.bfloat16, "varlen")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


def to_gpu(value):
    if isinstance(value, tuple):
        return tuple(map(to_gpu, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value


def test_float64_is_refused_by_native_and_auto_finds_another():
    case = make((5, 3))
    with pytest.raises(RuntimeError, match=r"native.*float64.*buckets"):
        ours(case, torch.float64, "native")
    torch.testing.assert_close(ours(case, torch.float64, "auto"), pytorch(case, torch.float64))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "rotation"])
def test_inputs_that_need_a_gradient_are_refused(name):
    (q, k, v, starts), options = make((5, 3), bias=True, rotation=True)
    tensors = {"q": q, "k": k, "v": v, "bias": options["bias"], "rotation": options["rotation"][1]}
    tensors = {key: x.float() for key, x in tensors.items()}
    tensors[name].requires_grad_()
    rotation = (options["rotation"][0].float(), tensors.pop("rotation"))
    with pytest.raises(ValueError, match=rf"{name} needs a gradient.*no_grad"):
        packed_attention(**tensors, cu_seqlens=starts, rotation=rotation)
    with torch.no_grad():
        assert packed_attention(**tensors, cu_seqlens=starts, rotation=rotation).isfinite().all()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": zeros(8, 4)}, ["q must be", "(tokens, heads, hd)", "(8, 4)"]),
        ({"q": zeros(8, 4, 6, dtype=torch.int32)}, ["q must be floating-point", "int32"]),
        ({"q": zeros(8, 4, 0), "k": zeros(8, 2, 0), "v": zeros(8, 2, 0)}, ["at least one channel", "(8, 4, 0)"]),
        ({"k": zeros(8, 3, 6)}, ["k must be", "divisor of 4", "(8, 3, 6)"]),
        ({"k": zeros(8, 0, 6)}, ["k must be", "(8, 0, 6)"]),
        ({"k": zeros(8, 2, 5)}, ["k must be", "6", "(8, 2, 5)"]),
        ({"v": zeros(7, 2, 6)}, ["v must be (8, 2, 6)", "(7, 2, 6)"]),
        ({"v": zeros(8, 2, 6, dtype=torch.bfloat16)}, ["v is torch.bfloat16", "one dtype"]),
        ({"k": zeros(9, 2, 6), "v": zeros(9, 2, 6)}, ["k has 9 tokens and q 8", "cu_seqlens_k"]),
        ({"cu_seqlens": torch.tensor([0, 8])}, ["cu_seqlens must be int32", "int64"]),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, ["cu_seqlens must be int32 (B + 1,)", "(0,)"]),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, ["from 0 to the 8 tokens of q", "[0, 7]"]),
        ({"cu_seqlens": torch.tensor([1, 8], dtype=torch.int32)}, ["from 0 to the 8 tokens of q", "[1, 8]"]),
        ({"cu_seqlens": torch.tensor([0, 9, 8], dtype=torch.int32)}, ["must rise", "[0, 9, 8]"]),
        ({"cu_seqlens_k": torch.tensor([0, 4, 8], dtype=torch.int32)}, ["cu_seqlens_k must be (2,)", "(3,)"]),
        ({"cu_seqlens_k": torch.tensor([0, 7], dtype=torch.int32)}, ["cu_seqlens_k", "8 tokens of k", "[0, 7]"]),
        ({"scale": float("nan")}, ["scale must be finite", "nan"]),
        ({"scale": -1.0}, ["scale must be", "greater than 0", "-1.0"]),
        ({"window": -1}, ["window must be None or at least 0", "-1"]),
        ({"bias": zeros(4, 8, 7)}, ["bias must be at least (4, 8, 8)", "(4, 8, 7)"]),
        ({"bias": zeros(1, 8, 8)}, ["bias must be float32 (4, S, Sk)", "(1, 8, 8)"]),
        ({"bias": zeros(4, 8, 8, dtype=torch.bfloat16)}, ["bias must be float32", "bfloat16"]),
        ({"rotation": (zeros(8, 6), zeros(7, 6))}, ["rotation must be two of float32 (8, 6)", "(7, 6)"]),
        (
            {"rotation": (zeros(8, 6), zeros(8, 6)), "cu_seqlens_k": torch.tensor([0, 8], dtype=torch.int32)},
            ["rotation needs q and k of the same tokens"],
        ),
        ({"impl": "fast"}, ["impl='fast'", "native"]),
    ],
    ids=str,
)
def test_misuse_is_a_clear_error(change, words):
    arguments = {"q": zeros(8, 4, 6), "k": zeros(8, 2, 6), "v": zeros(8, 2, 6), "cu_seqlens": offsets((8,))} | change
    with pytest.raises(ValueError) as caught:
        packed_attention(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
