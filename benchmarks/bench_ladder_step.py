"""A training step of a ladder beside its peers: bert-base dimensions, random weights, 16 x 128 tokens.

All of a test run interleaved in one process; the figures are medians of the rounds. What a step costs beyond the frozen
forward is counted in forwards of transformers in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.peers import (
    LinearProbe,
    PlainLadder,
    bert_base,
    full,
    ladder,
    lora,
    text_batch,
    training_step,
)
from tlfast.bench.measure import medians, timed_rounds

ROUNDS = 5
LORAS = {
    "LoRA": "peft LoRA, bf16 autocast",
    "compiled LoRA": "peft LoRA, bf16 autocast, compiled",
    "LoRA in float32": "peft LoRA",
}


def forward_of(backbone: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """transformers' own frozen forward."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def run() -> None:
        with torch.no_grad():
            backbone(**inputs)

    return run


def measured(
    benchmark: Any, precision: str, batch: dict[str, torch.Tensor], peers: dict[str, Callable[[], None]]
) -> tuple[dict[str, float], str]:
    """Seconds of every function, and what a step of ours costs beyond its frozen forward, in float32 forwards.

    Ours has a side network in bfloat16, as autocast computes it; "ladder, fp32" one in float32.
    """
    ours, exact = (ladder(bert_base(), precision=precision, side_precision=side) for side in ("bf16", "fp32"))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    functions = {
        "transformers forward": forward_of(bert_base(), batch),
        "frozen forward with taps": lambda: ours.backbone(**inputs),
        "ladder": training_step(ours, batch),
        "ladder, fp32": training_step(exact, batch),
        **peers,
    }
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["ladder"], rounds=3)
    extra = {
        side: (seconds[name] - seconds["frozen forward with taps"]) / seconds["transformers forward"]
        for side, name in (("bf16", "ladder"), ("fp32", "ladder, fp32"))
    }
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["extra_over_forward"] = extra["bf16"]
    benchmark.extra_info["extra_over_forward_fp32"] = extra["fp32"]
    text = f"{extra['bf16']:.2f} ({seconds['ladder']:.2f} s a step), side network in float32 {extra['fp32']:.2f}"
    return seconds, text


def test_training_step(benchmark: Any) -> None:
    backbone, batch = bert_base(), text_batch()
    peers = {
        "plain PyTorch ladder": training_step(PlainLadder(backbone).train(), batch),
        "linear probe": training_step(LinearProbe(backbone).train(), batch),
        "peft LoRA": training_step(lora(), batch),
        "full fine-tuning": training_step(full(), batch),
    }
    seconds, ours = measured(benchmark, "fp32", batch, peers)
    forward = seconds["transformers forward"]
    plain = (seconds["plain PyTorch ladder"] - forward) / forward
    benchmark.extra_info["row"] = {
        "what": "Training step beyond the frozen forward, in transformers forwards; bert-base, 16 x 128, r=8, fp32",
        "ours": ours,
        "peer": f"plain PyTorch ladder {plain:.2f}, LoRA {seconds['peft LoRA'] / forward - 1:.2f} "
        f"({seconds['peft LoRA']:.2f} s), full {seconds['full fine-tuning'] / forward - 1:.2f}, "
        f"linear probe {seconds['linear probe']:.2f} s a step",
        "how": "tlfast bench ladder_step",
    }


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_training_step_in_fewer_bits(benchmark: Any, precision: str) -> None:
    batch, halved = text_batch(), bert_base().bfloat16()
    compiled = torch.compile(lora())
    peers = {
        "transformers bf16 forward": forward_of(halved, batch),
        "plain PyTorch ladder, bf16 backbone": training_step(PlainLadder(halved).train(), batch),
        "peft LoRA, bf16 autocast": training_step(lora(), batch, autocast=True),
        "peft LoRA, bf16 autocast, compiled": training_step(compiled, batch, autocast=True),
        "peft LoRA": training_step(lora(), batch),
        "full fine-tuning, bf16 autocast": training_step(full(), batch, autocast=True),
    }
    seconds, ours = measured(benchmark, precision, batch, peers)
    plain = seconds["plain PyTorch ladder, bf16 backbone"] - seconds["transformers bf16 forward"]
    ratios = {name: seconds[peer] / seconds["ladder"] for name, peer in LORAS.items()}
    benchmark.extra_info["lora_over_ladder"] = ratios
    benchmark.extra_info["row"] = {
        "what": f"The same with a backbone in {precision}, beside peers in bfloat16",
        "ours": ours,
        "peer": f"plain PyTorch ladder {plain / seconds['transformers forward']:.2f}, "
        + ", ".join(f"{name} {ratio:.1f} x a step of ours" for name, ratio in ratios.items())
        + f", full {seconds['full fine-tuning, bf16 autocast'] / seconds['ladder']:.1f} x",
        "how": "tlfast bench ladder_step",
    }
