"""side_block: values and gradients against the float64 formula, padding, what is kept, every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.budget import assert_within_budget
from tests.ops.attention_cases import kept, needs_native
from tlfast import ops
from tlfast.ops.side_block import BlockSettings, BlockWeights
from tlfast.ops.side_block.reference import behind_the_last_token

pytestmark = pytest.mark.usefixtures("poisoned")
BERT = BlockSettings(4, "post", "layer", "gelu", False, 1e-12, 6**-0.5, 0.0, 0.0)
STYLES = {
    "bert": (BERT, {}),
    "dropped": (BERT._replace(attention_dropout=0.2, hidden_dropout=0.1), {}),
    "gpt2": (BERT._replace(placement="pre", activation="gelu_tanh", causal=True, eps=1e-5, hidden_dropout=0.1), {}),
    "wide": (
        BERT._replace(heads=12, attention_dropout=0.1, hidden_dropout=0.1),
        {"width": 96, "hidden": 384, "inner": 96},
    ),
    "clip": (
        BERT._replace(heads=3, placement="pre", activation="quick_gelu"),
        {"width": 17, "hidden": 33, "inner": 15},
    ),
    "t5": (BERT._replace(placement="pre", norm="rms", activation="relu", scale=1.0), {"bias": False}),
    "big heads": (BERT._replace(heads=2, activation="silu", hidden_dropout=0.3), {"width": 40, "inner": 40}),
    "rounded": (
        BERT._replace(heads=12, attention_dropout=0.1, hidden_dropout=0.1, precision="bf16"),
        {"width": 96, "hidden": 384, "inner": 96},
    ),
    "rounded, odd": (
        BERT._replace(heads=3, placement="pre", causal=True, precision="bf16"),
        {"width": 17, "hidden": 33, "inner": 15, "bias": False},
    ),
}


def case(style, batch, length, masked, seed=0):
    """A block's settings, and in float64 x, every weight, the output's gradient; key_mask; seeds."""
    settings, shape = STYLES[style]
    width, hidden, inner = shape.get("width", 24), shape.get("hidden", 40), shape.get("inner", 24)
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).double()

    def norm():
        return 1 + draw(width, scale=0.2), None if settings.norm == "rms" else draw(width, scale=0.2)

    def layer(outputs, inputs):
        return draw(outputs, inputs, scale=inputs**-0.5), draw(outputs, scale=0.2) if shape.get("bias", True) else None

    weights = BlockWeights(
        *norm(), *layer(3 * inner, width), *layer(width, inner), *norm(), *layer(hidden, width), *layer(width, hidden)
    )
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, length, generator=generator) > 0.3
        key_mask &= torch.arange(length) < torch.randint(0, length + 1, (batch, 1), generator=generator)
    seeds = torch.randint(-(2**62), 2**62, (3,), generator=generator)
    return settings, draw(batch, length, width), weights, draw(batch, length, width), key_mask, seeds


def run(given, dtype, impl):
    """Output, and gradients of x and of each weight, by name."""
    settings, x, weights, dout, key_mask, seeds = given
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, *weights)]
    out = ops.side_block(leaves[0], BlockWeights(*leaves[1:]), settings, key_mask=key_mask, seeds=seeds, impl=impl)
    names = [name for name, leaf in zip(("x", *BlockWeights._fields), leaves, strict=True) if leaf is not None]
    gradients = torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout.to(dtype))
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def check(given):
    # many layers deep: what PyTorch happens to have exact ours may round, at the size of its terms
    roundings = (
        4 * torch.finfo(torch.float32).eps if given[0].precision == "fp32" else torch.finfo(torch.bfloat16).eps / 2
    )
    ours, plain = run(given, torch.float32, "native"), run(given, torch.float32, "reference")
    for name, exact in run((given[0]._replace(precision="fp32"), *given[1:]), torch.float64, "reference").items():
        rounding = roundings * exact.abs().max() if exact.numel() else 0.0
        assert_within_budget(name, ours[name], plain[name], exact, rounding)


@needs_native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("style", STYLES)
@given(batch=st.integers(1, 5), length=st.integers(1, 40), masked=st.booleans(), seed=st.integers(0, 3))
def test_native_is_as_exact_as_pytorch(style, batch, length, masked, seed):
    check(case(style, batch, length, masked, seed))


@needs_native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 63), (2, 65), (11, 100), (2, 130), (40, 9)])
@pytest.mark.parametrize("style", ["wide", "gpt2", "rounded", "rounded, odd"])
def test_shapes_around_the_strips(style, batch, length, masked):
    check(case(style, batch, length, masked))


@needs_native
def test_in_bf16_weights_are_read_rounded():
    """Rounded beforehand they change no bit; in float32 they do, by about what bfloat16 has."""
    settings, *given = case("rounded", 3, 70, True)
    matrices = ("qkv_weight", "output_weight", "up_weight", "down_weight")
    weights = given[1]
    rounded = weights._replace(**{name: getattr(weights, name).bfloat16().double() for name in matrices})
    before, after = (run((settings, given[0], w, *given[2:]), torch.float32, "native") for w in (weights, rounded))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))
    exact = run((settings._replace(precision="fp32"), *given), torch.float32, "native")
    for name in ("out", "x", *matrices):
        difference = (before[name] - exact[name]).norm() / exact[name].norm()
        assert 2**-12 < difference < 2**-6, f"{name}: {difference}"


@needs_native
@pytest.mark.parametrize("isa", ["base", "v3", "v4", "vnni"])
def test_every_instruction_set(isa, fresh_process):
    code = """
import torch
torch.set_num_threads(1)
from tests.ops.test_side_block import case, check
for style in ("wide", "dropped", "gpt2", "clip", "t5", "big heads", "rounded", "rounded, odd"):
    check(case(style, 3, 70, True))
print("same")
"""
    assert fresh_process(code, TLFAST_CPU_ISA=isa) == "same"


@needs_native
@pytest.mark.parametrize("style", ["dropped", "rounded"])
def test_the_number_of_threads_changes_no_bit(style):
    given, before, results = case(style, 13, 37, True), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(given, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0].values(), other.values(), strict=True))


@needs_native
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("style", ["bert", "gpt2", "rounded, odd"])
def test_a_sequence_has_the_same_bits_alone_and_among_others(style):
    """Short ones share a strip; what is behind another's last token stands between them."""
    settings, x, weights, dout, _, _ = case(style, 20, 31, False)
    settings = settings._replace(attention_dropout=0.0, hidden_dropout=0.0)  # whose mask goes by a row's place
    key_mask = torch.arange(31) < torch.randint(0, 32, (20, 1), generator=torch.Generator().manual_seed(1))
    together = run((settings, x, weights, dout, key_mask, None), torch.float32, "native")
    for i in range(20):
        alone = run(
            (settings, x[i : i + 1], weights, dout[i : i + 1], key_mask[i : i + 1], None), torch.float32, "native"
        )
        for name in ("out", "x"):
            assert torch.equal(alone[name][0], together[name][i]), f"{name} of sequence {i}"


@needs_native
@pytest.mark.parametrize("style", ["dropped", "rounded"])
def test_what_stands_behind_the_last_token_is_neither_read_nor_given(style):
    settings, x, weights, dout, _, seeds = case(style, 3, 50, False)
    key_mask = torch.arange(50) < torch.tensor([[50], [17], [0]])
    behind = behind_the_last_token(key_mask)
    assert behind.sum(1).tolist() == [0, 33, 50]
    clean = run((settings, x, weights, dout, key_mask, seeds), torch.float32, "native")
    x, dout = x.clone(), dout.clone()
    x[behind] = dout[behind] = float("nan")
    soiled = run((settings, x, weights, dout, key_mask, seeds), torch.float32, "native")
    assert all(torch.equal(a, b) for a, b in zip(clean.values(), soiled.values(), strict=True))
    assert (clean["out"][behind] == 0).all() and (clean["x"][behind] == 0).all()
    assert (clean["out"][~behind] != 0).any()


@needs_native
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0)])
def test_nothing_gives_nothing(batch, length):
    given = case("bert", batch, length, False)
    for name, result in run(given, torch.float32, "native").items():
        assert name in ("out", "x") or (result == 0).all(), name
    assert run(given, torch.float32, "native")["out"].shape == (batch, length, 24)


@needs_native
@pytest.mark.parametrize(("style", "rows"), [("dropped", 2), ("gpt2", 1)])
def test_kept_are_x_two_rows_and_statistics(style, rows):
    settings, x, weights, _, _, seeds = case(style, 3, 50, False)
    x, weights = x.float().requires_grad_(), [None if w is None else w.float().requires_grad_() for w in weights]

    def forward():
        return ops.side_block(x, BlockWeights(*weights), settings, seeds=seeds, impl="native")

    saved, new_bytes, _ = kept(forward, [x, *weights, seeds])
    assert new_bytes == 4 * 3 * 50 * (rows * 24 + 2 * settings.heads)
    assert not any(t.shape[-2:] == (50, 50) for t in saved)


@pytest.mark.parametrize("style", ["dropped", "gpt2"])
def test_the_formula_is_differentiated_rightly(style):
    settings, x, weights, _, key_mask, seeds = case(style, 2, 5, True)
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in weights)]

    def formula(x, *weights):
        return ops.side_block(x, BlockWeights(*weights), settings, key_mask=key_mask, seeds=seeds, impl="reference")

    assert torch.autograd.gradcheck(formula, leaves, fast_mode=True)


@needs_native
@pytest.mark.parametrize("style", ["dropped", "rounded"])
def test_the_operators_obey_pytorch(style):
    settings, x, weights, dout, _, seeds = case(style, 2, 20, False)
    dense = [None if w is None else w.float() for w in weights]
    forward, backward = torch.ops.tlfast.side_block_fwd.default, torch.ops.tlfast.side_block_bwd.default
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    torch.library.opcheck(forward, (x.float(), key_mask, seeds, dense, *settings))
    _, *made = forward(x.float(), key_mask, seeds, dense, *settings)
    torch.library.opcheck(backward, (dout.float(), x.float(), *made, key_mask, seeds, dense, *settings))


@needs_native
def test_it_compiles_into_one_graph():
    settings, x, weights, _, _, seeds = case("dropped", 2, 20, False)
    dense = BlockWeights(*(w.float().requires_grad_() for w in weights))

    def loss(x, seeds):
        return ops.side_block(x, dense, settings, seeds=seeds).square().sum()

    eager = torch.autograd.grad(loss(x.float(), seeds), dense)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x.float(), seeds), dense)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 24)}, ["x must be", "(2, 24)"]),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, ["key_mask", "(2, 5)", "(2, 3)"]),
        ({"key_mask": torch.ones(2, 5)}, ["key_mask", "bool", "float32"]),
        ({"seeds": None}, ["seeds", "NoneType", "torch.randint"]),
        ({"seeds": torch.zeros(2, dtype=torch.int64)}, ["seeds", "(2,)"]),
        ({"settings": {"heads": 5}}, ["heads", "24", "5"]),
        ({"settings": {"placement": "sandwich"}}, ["placement", "sandwich", "post"]),
        ({"settings": {"precision": "fp16"}}, ["precision", "fp16", "bf16"]),
        ({"settings": {"hidden_dropout": 1.0}}, ["hidden_dropout", "1.0"]),
        ({"settings": {"eps": 0.0}}, ["eps", "0.0"]),
        ({"weights": {"down_weight": torch.zeros(24, 39)}}, ["down_weight", "(24, 40)", "(24, 39)"]),
        ({"impl": "cuda"}, ["impl", "cuda", "native"]),
    ],
)
def test_misuse_is_a_clear_error(change, words):
    settings, x, weights, _, _, seeds = case("dropped", 2, 5, False)
    arguments = {"x": x, "seeds": seeds, "key_mask": None} | change
    arguments["weights"] = weights._replace(**change.get("weights", {}))
    arguments["settings"] = settings._replace(**change.get("settings", {}))
    with pytest.raises(ValueError) as caught:
        ops.side_block(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@needs_native
def test_float64_is_refused_by_native_and_auto_finds_the_formula():
    settings, x, weights, _, _, seeds = case("dropped", 2, 5, False)
    with pytest.raises(RuntimeError, match="float32"):
        ops.side_block(x, weights, settings, seeds=seeds, impl="native")
    assert ops.side_block(x, weights, settings, seeds=seeds).dtype == torch.float64
