"""One frozen forward of each style of transformer at real dimensions: every tap, in bf16 and int8.

Random weights; norms' factors are spread as trained ones are (log-normal, sigma 0.3), so that folding them matters.
Full-length inputs. Beside ours transformers itself (sdpa attention, all hidden states) in fp32 and bf16, interleaved in
one process; figures are medians. The tap error is ||tap - exact|| / ||exact|| of the worst block against the model in
float64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import tlfast
from benchmarks.frozen import Batch, TapErrors, timed
from tlfast.backbone import FrozenBackbone
from tlfast.bench.measure import medians, timed_rounds

ROUNDS = 5
OURS = ("bf16", "int8")
# TinyLlama's width and feed-forward, a few of its 22 blocks
_LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 32_000,
}
_T5 = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}


@dataclass(frozen=True)
class Style:
    """make: a model without a head. batch: of inputs; length: tokens of each, 0 for images; targets: a decoder's."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    length: int = 0
    targets: int = 0

    def inputs(self) -> Batch:
        """One batch, random and of full length."""
        generator = torch.Generator().manual_seed(0)

        def tokens(length: int) -> torch.Tensor:
            return torch.randint(5, 30_000, (self.batch, length), generator=generator)

        if not self.length:
            return {"pixel_values": torch.randn(self.batch, 3, 224, 224, generator=generator)}
        ids = tokens(self.length)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": tokens(self.targets)} if self.targets else {})


STYLES = (
    Style("bert-base", lambda: hf.BertModel(hf.BertConfig()), 16, 128),
    Style("T5-base, encoder", lambda: hf.T5EncoderModel(hf.T5Config(**_T5)), 16, 128),
    Style("T5-base", lambda: hf.T5Model(hf.T5Config(**_T5)), 8, 128, 64),
    Style("GPT-2 small", lambda: hf.GPT2Model(hf.GPT2Config()), 16, 128),
    Style("Llama 1B wide, 4 blocks", lambda: hf.LlamaModel(hf.LlamaConfig(**_LLAMA)), 1, 512),
    Style(
        "Mistral 1B wide, window 128, 4 blocks",
        lambda: hf.MistralModel(hf.MistralConfig(**_LLAMA, sliding_window=128)),
        1,
        512,
    ),
    Style("ViT-base", lambda: hf.ViTModel(hf.ViTConfig(), add_pooling_layer=False), 8),
    Style("CLIP-B/32, images", lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig()), 32),
    Style("CLIP-B/32, text", lambda: hf.CLIPTextModel(hf.CLIPTextConfig()), 32, 77),
)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_frozen_families(benchmark: Any, style: Style) -> None:
    model, inputs = _model(style), style.inputs()
    frozen = {precision: timed(functools.partial(tlfast.freeze, model, precision)) for precision in OURS}
    backbones = {precision: backbone for precision, (backbone, _) in frozen.items()}
    paths = {row["path"] for backbone in backbones.values() for row in backbone.describe()}
    assert paths == {"packed"}
    errors = _errors(model, inputs, backbones)

    half = copy.deepcopy(model).bfloat16()
    functions = {
        f"tlfast {precision}": functools.partial(b, **inputs, packed=True) for precision, b in backbones.items()
    }
    functions["eager fp32"] = functools.partial(model, **inputs, output_hidden_states=True)
    functions["eager bf16"] = functools.partial(half, **_as(inputs, torch.bfloat16), output_hidden_states=True)
    with torch.no_grad():
        seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["tlfast bf16"], rounds=1)

    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["tap_errors"] = errors
    benchmark.extra_info["freeze_seconds"] = {precision: spent for precision, (_, spent) in frozen.items()}
    benchmark.extra_info["row"] = {
        "what": f"Frozen forward with every tap; {style.name}",
        "ours": "; ".join(
            f"{precision} {_time(seconds[f'tlfast {precision}'])}, "
            f"{seconds['eager fp32'] / seconds[f'tlfast {precision}']:.1f} x eager fp32, tap error "
            f"{100 * errors[f'tlfast {precision}']:.2g} %"
            for precision in OURS
        ),
        "peer": f"eager fp32 {_time(seconds['eager fp32'])}, eager bf16 {_time(seconds['eager bf16'])}, tap error "
        f"{100 * errors['eager bf16']:.2g} %",
        "how": "tlfast bench frozen_families",
    }


def _model(style: Style) -> Any:
    torch.manual_seed(0)
    model = style.make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.mul_(torch.randn_like(parameter).mul(0.3).exp())
    return model


def _errors(model: Any, inputs: Batch, backbones: dict[str, FrozenBackbone]) -> dict[str, float]:
    """Of the worst block, against the model in float64; transformers in fp32 and bf16 beside ours."""
    errors, exact = {}, _module_taps(model, inputs, torch.float64)
    found = {
        "eager fp32": functools.partial(_module_taps, model, inputs, torch.float32),
        "eager bf16": functools.partial(_module_taps, model, inputs, torch.bfloat16),
    }
    found |= {f"tlfast {name}": functools.partial(_taps, backbone, inputs) for name, backbone in backbones.items()}
    for name, taps in found.items():
        error = TapErrors()
        error.add(taps(), exact)
        errors[name] = error.worst
    return errors


@torch.no_grad()
def _module_taps(model: Any, inputs: Batch, dtype: torch.dtype) -> list[torch.Tensor]:
    """The outputs of the blocks of transformers' own modules in a dtype."""
    twin, outputs = copy.deepcopy(model), []
    for stack in tlfast.freeze(twin).stacks.values():
        for block in stack.blocks:
            block.register_forward_hook(lambda _block, _args, output: outputs.append(output))
    twin.to(dtype)(**_as(inputs, dtype))
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _taps(backbone: FrozenBackbone, inputs: Batch) -> list[torch.Tensor]:
    output = backbone(**inputs)
    halves = (output.encoder, output.decoder) if hasattr(output, "encoder") else (output,)
    return [tap for half in halves for tap in half.taps]


def _as(inputs: Batch, dtype: torch.dtype) -> Batch:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"
