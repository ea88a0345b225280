"""A few training steps of each architecture at real dimensions: what is kept, how long it takes, the peak.

Random weights, float32, r=8, the ladder started from the backbone ("prune") and with the backbone's own dropout. Beside
it peft LoRA r=8 on a copy of the same model, plain and with gradient checkpointing, interleaved in one process.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import tlfast
from benchmarks.memory import peak_bytes
from benchmarks.peers import REDUCTION, SEQUENCE, training_step
from benchmarks.styles import STYLES, TARGET, Style
from tlfast.bench.measure import medians, saved_bytes, timed_rounds

ROUNDS = 2
MIB = 2**20
LADDER, LORA, CHECKPOINTED = "ladder", "peft LoRA", "checkpointed LoRA"


def _ladder(style: Style, model: nn.Module, batch: dict[str, torch.Tensor]) -> tlfast.LadderModel:
    """Ours on the model, after checking that the frozen backbone computes what the model does."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    backbone = tlfast.freeze(model)
    if style.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = batch["labels"]
    output = backbone(**inputs)
    with torch.no_grad():
        found = backbone.base(**inputs, output_hidden_states=True)
    expected = found.last_hidden_state if "last_hidden_state" in found else found.decoder_hidden_states[-1]
    torch.testing.assert_close(getattr(output, "decoder", output).last_hidden_state, expected)
    config = tlfast.LadderConfig(reduction=REDUCTION, **style.ladder)
    ladder = tlfast.LadderModel(backbone, task=style.task, config=config)
    ladder.calibrate([batch])
    return ladder.train()


def _with_checkpointing(lora: Any, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, run while the peer recomputes its blocks in the backward pass."""

    def checkpointed() -> Any:
        lora.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return function()
        finally:
            lora.base_model.model.gradient_checkpointing_disable()

    return checkpointed


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_training(benchmark: Any, style: Style) -> None:
    gc.collect()  # the model before this one
    torch.manual_seed(0)
    model, batch = style.make().eval(), style.inputs()
    lora = get_peft_model(copy.deepcopy(model), style.lora).train()
    ladder = _ladder(style, model, batch)
    step, lora_step = training_step(ladder, batch), training_step(lora, batch)
    steps = {LADDER: step, LORA: lora_step, CHECKPOINTED: _with_checkpointing(lora, lora_step)}
    forwards = {LADDER: lambda: ladder(**batch), LORA: lambda: lora(**batch)}
    forwards[CHECKPOINTED] = _with_checkpointing(lora, forwards[LORA])

    inputs = {name: value for name, value in batch.items() if style.task == "seq2seq-lm" or name != "labels"}

    def frozen() -> None:
        with torch.no_grad():
            model(**inputs)

    timed = {"frozen forward": frozen, "ladder, forward": forwards[LADDER]} | steps
    seconds = medians(timed_rounds(timed, ROUNDS))
    saved = {name: saved_bytes(forward) / style.batch / MIB for name, forward in forwards.items()}
    peak = {name: peak_bytes(function) / MIB for name, function in steps.items()}
    assert torch.isfinite(forwards[LADDER]().loss)
    benchmark.pedantic(step, rounds=1)

    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["saved_mib_per_sample"] = saved
    benchmark.extra_info["peak_mib"] = peak
    benchmark.extra_info["weights_mib"] = ladder.backbone.weight_bytes() / MIB
    benchmark.extra_info["trained_parameters"] = ladder.trainable_parameters()
    figures = {
        name: f"{saved[name]:.3g} MiB a sample, {seconds[name]:.2f} s, peak {peak[name]:.0f} MiB" for name in steps
    }
    benchmark.extra_info["row"] = {
        "what": f"Saved for backward, step, its peak: {style.name}, {style.task}, {_shape(style)}, r=8, fp32",
        "ours": f"{figures.pop(LADDER)} (a frozen forward {seconds['frozen forward']:.2f} s)",
        "peer": "; ".join(f"{name} r=8 {figure}" for name, figure in figures.items()),
        "how": "tlfast bench families",
    }


def _shape(style: Style) -> str:
    if style.task == "image-classification":
        return f"{style.batch} x 224 x 224"
    target = f" to {TARGET}" if style.task == "seq2seq-lm" else ""
    return f"{style.batch} x {SEQUENCE}{target} tokens"
