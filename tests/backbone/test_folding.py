"""Folding: the folded block gives what the block gave, in float64, and rounding it costs no more."""

import copy

import pytest
import torch

import tlfast
from tests.models import inputs_of, tiny
from tlfast.backbone import prepare
from tlfast.backbone.folding import Folded, fold
from tlfast.backbone.gated import GatedFeedForward
from tlfast.backbone.packed_block import Norm
from tlfast.backbone.parts import Part, find_submodule, linears_of, norm_weight
from tlfast.backbone.prepare import groups_of

PRECISIONS = ("bf16", "int8", "nf4")
NORMS_BEFORE = ("gpt2", "opt", "llama", "qwen3", "gemma2", "t5", "t5-v1.1", "vit", "dinov2", "clip-text", "modernbert")


def widely_scaled(family, seed=0):
    """A model whose norms and layer scales differ from 1 as trained ones do: some channels 20 times others."""
    model = tiny(family, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                change = torch.randn(parameter.shape, generator=generator)
                if name.endswith("bias"):
                    parameter.add_(change * 0.3)
                else:
                    parameter.copy_((change * 0.8).exp() * 0.5)
    return model


def stacks_of(model):
    return tlfast.freeze(model).stacks


def smoothing(stacks):
    """Factors of int8's inputs, one a column, the same for what reads the same input."""
    generator, smooth = torch.Generator().manual_seed(1), {}
    for stack in stacks.values():
        for block in stack.blocks:
            for group in groups_of(block, stack.parts):
                width = group[0].weight.shape[0 if type(group[0]).__name__ == "Conv1D" else 1]
                smooth |= dict.fromkeys(map(id, group), torch.randn(width, generator=generator).mul(0.5).exp())
    return smooth


def fold_in_place(model, precision):
    """The model's blocks with folded weights, still transformers' modules; and all of what was folded."""
    backbone = tlfast.freeze(model)
    smooth = smoothing(backbone.stacks) if precision == "int8" else {}
    model.double()
    for stack in backbone.stacks.values():
        for block in stack.blocks:
            folded = fold(stack, block, precision, smooth)
            for linear in linears_of(block):
                weight, bias = folded.weights[id(linear)]
                linear.weight.data = weight.T if type(linear).__name__ == "Conv1D" else weight
                if bias is not None:
                    linear.bias.data = bias
            for module in block.modules():
                if id(module) in folded.modules:
                    module.load_state_dict(folded.modules[id(module)].state_dict())
    return backbone, smooth


def run(backbone, inputs):
    output = backbone(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})
    halves = (output.encoder, output.decoder) if hasattr(output, "encoder") else (output,)
    return [tensor for half in halves for tensor in (*half.taps, half.last_hidden_state)]


@pytest.mark.parametrize("family", [*NORMS_BEFORE, "bert", "bart"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_folding_changes_nothing_in_float64(family, precision):
    model, inputs = widely_scaled(family), inputs_of(family)
    plain = tlfast.freeze(copy.deepcopy(model))
    plain.model.double()
    folded, _ = fold_in_place(copy.deepcopy(model), precision)
    # transformers' RMS norms round to float32 whatever they are given
    rounding = torch.finfo(torch.float32).eps if folded.block_spec.norm == "rms" else 1e-13
    for ours, exact in zip(run(folded, inputs), run(plain, inputs), strict=True):
        assert (ours - exact).norm() <= 10 * rounding * exact.norm()


@pytest.mark.parametrize("family", NORMS_BEFORE)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_norms_keep(family, precision):
    model = widely_scaled(family)
    before = copy.deepcopy(stacks_of(model))
    backbone, smooth = fold_in_place(model, precision)
    for name, stack in backbone.stacks.items():
        for block, plain in zip(stack.blocks, before[name].blocks, strict=True):
            norm, old = (find_submodule(of, stack.parts.attention.norm)[1] for of in (block, plain))
            weight = norm_weight(norm)
            if weight is None:  # nn.Identity
                continue
            factor = smooth[id(groups_of(block, stack.parts)[0][0])] if precision == "int8" else 1.0
            expected = torch.ones_like(weight) if precision == "bf16" else norm_weight(old) * factor
            torch.testing.assert_close(weight, expected.double(), rtol=1e-6, atol=1e-6)
            assert getattr(norm, "bias", None) is None or not norm.bias.any()
            ours = Norm.of(norm, rms=True)
            assert ours.bias is None
            assert (ours.weight is None) == (precision == "bf16")


def not_folded(stack, block, precision, smooth):
    parts = {id(linear): Part(linear) for linear in linears_of(block)}
    return Folded({key: (part.weight, part.bias) for key, part in parts.items()}, {}, smooth)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5-encoder", "vit"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_what_is_folded_costs_no_more(family, precision, monkeypatch):
    def mean_error():
        errors = []
        for seed in range(3):
            model, inputs = widely_scaled(family, seed), inputs_of(family)
            exact = run(tlfast.freeze(model), inputs)
            ours = run(tlfast.freeze(model, precision), inputs)
            errors += [(a - b).norm() / b.norm() for a, b in zip(ours, exact, strict=True)]
        return torch.stack(errors).mean()

    folded = mean_error()
    monkeypatch.setattr(prepare, "fold", not_folded)
    assert folded <= 1.1 * mean_error()


@pytest.mark.parametrize("family", ["llama", "t5-v1.1", "gemma2"])
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_gated_feed_forward_is_the_models_with_what_is_stored(family, precision):
    model = tiny(family)
    plain, x = stacks_of(model), torch.randn(2, 5, 48)
    for name, stack in tlfast.freeze(model, precision).stacks.items():
        block = stack.blocks[0]
        path, ours = next((p, m) for p, m in block.named_modules() if isinstance(m, GatedFeedForward))
        theirs = copy.deepcopy(plain[name].blocks[0].get_submodule(path))
        for layer, _ in list(theirs.named_parameters()):
            theirs.get_submodule(layer.removesuffix(".weight")).weight.data = ours.get_submodule(
                layer.removesuffix(".weight")
            ).weight
        with torch.no_grad():
            half = copy.deepcopy(theirs).bfloat16()(x.bfloat16()).double()
            exact = theirs.double()(x.double())
            assert (ours(x) - exact).norm() <= 1.5 * (half - exact).norm()
