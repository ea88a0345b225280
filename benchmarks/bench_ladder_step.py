"""A training step of a ladder beside its peers: bert-base dimensions, random weights, 16 x 128 tokens, float32.

All run interleaved in one process; the figure is the median of the rounds.
"""

from __future__ import annotations

import torch

from benchmarks.peers import PlainLadder, bert_base, full, ladder, lora, text_batch, training_step
from tlfast.bench.measure import medians, timed_rounds

ROUNDS = 9


def test_training_step(benchmark):
    backbone, batch = bert_base(), text_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = ladder(backbone)

    def theirs() -> None:
        with torch.no_grad():
            backbone(**inputs)

    functions = {
        "transformers forward": theirs,
        "frozen forward with taps": lambda: ours.backbone(**inputs),
        "ladder": training_step(ours, batch),
        "plain PyTorch ladder": training_step(PlainLadder(backbone).train(), batch),
        "peft LoRA": training_step(lora(), batch),
        "full fine-tuning": training_step(full(), batch),
    }
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["ladder"], rounds=3)

    forward = seconds["transformers forward"]
    extra = (seconds["ladder"] - seconds["frozen forward with taps"]) / forward
    plain = (seconds["plain PyTorch ladder"] - forward) / forward
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["extra_over_forward"] = extra
    benchmark.extra_info["row"] = {
        "what": "Training step beyond the frozen forward, in transformers forwards; bert-base, 16 x 128, r=8, fp32",
        "ours": f"{extra:.2f} ({seconds['ladder']:.2f} s a step)",
        "peer": f"plain PyTorch ladder {plain:.2f}, LoRA {seconds['peft LoRA'] / forward - 1:.2f} "
        f"({seconds['peft LoRA']:.2f} s), full {seconds['full fine-tuning'] / forward - 1:.2f}",
        "how": "tlfast bench ladder_step",
    }
