"""side_step: one token through a rung and a block, native against the float64 formula and against the side block."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tlfast import _native, ops
from tlfast.backbone.parts import BlockSpec
from tlfast.ladder.attention import rotation_of
from tlfast.ladder.blocks import SideBlock
from tlfast.ladder.decoding import _settings, _weights
from tlfast.ladder.rung import Rung

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
PLAIN = BlockSpec(width=24, heads=4, kv_heads=4, head_dim=6, hidden=40, placement="pre", causal=True)
STYLES = {
    "gpt2": dataclasses.replace(PLAIN, activation="gelu_new"),
    "post": dataclasses.replace(PLAIN, placement="post", activation="relu"),
    "llama": dataclasses.replace(
        PLAIN, kv_heads=2, norm="rms", gated=True, bias=False, qkv_bias=False, positions="rotary", activation="silu"
    ),
    "qwen3": dataclasses.replace(
        PLAIN, kv_heads=1, norm="rms", gated=True, bias=False, qkv_bias=False, qk_norm=True, positions="rotary"
    ),
    "gemma2": dataclasses.replace(
        PLAIN, placement="sandwich", norm="rms", gated=True, bias=False, qkv_bias=False, positions="rotary", scale=0.3
    ),
    "clip": dataclasses.replace(PLAIN, activation="quick_gelu", width=17, hidden=33, head_dim=5, heads=3, kv_heads=3),
}


def case(spec, batch, past, width=50, seed=0, masked=True, biased=False):
    """A block, a rung and the inputs of one step, with every weight drawn."""
    torch.manual_seed(seed)
    block, rung = SideBlock(spec).eval(), Rung(width, spec.width, gate="channel" if seed % 2 else "scalar")
    with torch.no_grad():
        for parameter in (*block.parameters(), *rung.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tap, s = torch.randn(batch, width), torch.randn(batch, spec.width)
    keys, values = (torch.randn(batch, spec.kv_heads, past, spec.head_dim) for _ in range(2))
    mask = torch.rand(batch, past + 1) > 0.3 if masked else None
    bias = torch.randn(spec.heads, past + 1) if biased else None
    rotation = None
    if spec.positions == "rotary":
        frequencies = 1 / 100 ** (torch.arange(spec.head_dim // 2) / spec.head_dim)
        cosines, sines = rotation_of(frequencies, torch.full((batch, 1), past), 1.0)
        rotation = (cosines[:, 0, 0], sines[:, 0, 0])
    return block, rung, (tap, s, keys, values), {"key_mask": mask, "bias": bias, "rotation": rotation}


def run(block, rung, inputs, options, dtype, impl):
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    options = {name: tuple(map(cast, x)) if isinstance(x, tuple) else cast(x) for name, x in options.items()}
    weights = type(_weights(block, rung))(*map(cast, _weights(block, rung)))
    return ops.side_step(*map(cast, inputs), weights, _settings(block, rung), **options, impl=impl)


@needs_native
@pytest.mark.usefixtures("poisoned", "two_threads")
@pytest.mark.parametrize("style", STYLES)
@given(batch=st.integers(1, 5), past=st.integers(0, 40), seed=st.integers(0, 3), masked=st.booleans())
def test_native_is_as_exact_as_pytorch(style, batch, past, seed, masked):
    arguments = case(STYLES[style], batch, past, seed=seed, masked=masked, biased=bool(seed // 2))
    exact = run(*arguments, torch.float64, "reference")
    plain = run(*arguments, torch.float32, "reference")
    ours = run(*arguments, torch.float32, "native")
    for name, *results in zip(("out", "keys", "values"), ours, plain, exact, strict=True):
        # a step is ten layers deep: each of them may round once more than PyTorch's own, at the size of its terms
        rounding = 10 * torch.finfo(torch.float32).eps * results[2].abs().max()
        assert_within_budget(f"{style} {name}", *results, rounding=rounding)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("impl", ["reference", pytest.param("native", marks=needs_native)])
def test_a_step_is_what_the_block_computes_for_the_last_position(style, impl):
    spec, past = STYLES[style], 7
    block, rung, _, _ = case(spec, 2, past)
    taps, states = torch.randn(2, past + 1, 50), torch.randn(2, past + 1, spec.width)
    mask = torch.ones(2, past + 1, dtype=torch.bool)
    mask[1, :3] = False
    rotation = None
    if spec.positions == "rotary":
        rotation = rotation_of(torch.tensor([1.0, 0.3, 0.1]), torch.arange(past + 1)[None], 1.0)
    seen = {}

    class Keep:
        def extend(self, k, v):
            seen.update(keys=k.transpose(1, 2), values=v.transpose(1, 2))
            return k, v

    with torch.no_grad():
        expected = block(rung(taps, states), mask, None, rotation, cache=Keep())
    last = None if rotation is None else tuple(part[:, -1, 0] for part in rotation)
    cached = (seen["keys"][:, :, :-1], seen["values"][:, :, :-1])
    out, keys, values = ops.side_step(
        taps[:, -1],
        states[:, -1],
        *cached,
        _weights(block, rung),
        _settings(block, rung),
        key_mask=mask,
        rotation=last,
        impl=impl,
    )
    torch.testing.assert_close(out, expected[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys, seen["keys"][:, :, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, seen["values"][:, :, -1], rtol=1e-5, atol=1e-5)


@needs_native
def test_a_query_that_sees_no_key_adds_nothing_but_biases():
    block, rung, inputs, options = case(PLAIN, 2, 3)
    options["key_mask"] = torch.zeros(2, 4, dtype=torch.bool)
    plain = run(block, rung, inputs, options, torch.float32, "reference")
    torch.testing.assert_close(run(block, rung, inputs, options, torch.float32, "native"), plain)


def test_an_empty_batch_gives_empty_results():
    block, rung, inputs, options = case(PLAIN, 0, 3, masked=False)
    assert run(block, rung, inputs, options, torch.float32, "auto")[0].shape == (0, 24)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tap": torch.zeros(2, 49)}, ["tap", "(2, 50)", "(2, 49)"]),
        ({"s": torch.zeros(2, 23)}, ["s must be", "(2, 24)"]),
        ({"keys": torch.zeros(2, 3, 3, 6)}, ["keys", "(2, 4, 3, 6)", "(2, 3, 3, 6)"]),
        ({"values": torch.zeros(2, 4, 2, 6)}, ["values", "(2, 4, 3, 6)"]),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, ["key_mask", "(2, 4)", "(2, 3)"]),
        ({"key_mask": torch.ones(2, 4)}, ["key_mask", "bool", "float32"]),
        ({"bias": torch.zeros(1, 1)}, ["bias", "(4, 4)", "(1, 1)"]),
        ({"rotation": (torch.zeros(3, 6), torch.zeros(3, 6))}, ["rotation", "(3, 6)"]),
        ({"settings": {"kv_heads": 3}}, ["kv_heads", "4 heads", "3"]),
        ({"settings": {"placement": "none"}}, ["placement", "none", "sandwich"]),
        ({"weights": {"down_weight": torch.zeros(24, 39)}}, ["down_weight", "(24, 40)", "(24, 39)"]),
        ({"weights": {"alpha": torch.zeros(2)}}, ["alpha", "(24,)", "(2,)"]),
    ],
)
def test_misuse_is_a_clear_error(change, words):
    block, rung, inputs, options = case(PLAIN, 2, 3)
    arguments = dict(zip(("tap", "s", "keys", "values"), inputs, strict=True)) | options | change
    arguments["weights"] = _weights(block, rung)._replace(**change.get("weights", {}))
    arguments["settings"] = _settings(block, rung)._replace(**change.get("settings", {}))
    with pytest.raises(ValueError) as caught:
        ops.side_step(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_native_cannot_take_is_refused_and_auto_finds_another():
    block, rung, inputs, options = case(PLAIN, 2, 3)
    with pytest.raises(RuntimeError, match="side_step"):
        run(block, rung, inputs, options, torch.float64, "native")
    assert run(block, rung, inputs, options, torch.float64, "auto")[0].dtype == torch.float64


@needs_native
def test_float64_inputs_are_refused_wherever_they_are():
    block, rung, inputs, options = case(PLAIN, 2, 3)
    *others, values = inputs
    for changed, extra in (((*others, values.bfloat16()), {}), (inputs, {"bias": torch.zeros(4, 4).double()})):
        with pytest.raises(RuntimeError, match="float32"):
            ops.side_step(
                *changed, _weights(block, rung), _settings(block, rung), **{**options, **extra}, impl="native"
            )
