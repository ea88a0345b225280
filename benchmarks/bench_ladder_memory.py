"""Memory of training: what is kept for the backward pass, the peak of a step, and what a process grows by.

Random weights, dropout 0.1. bert-base dimensions: 16 x 128 tokens, float32, and for processes 32 x 128. T5-base
dimensions, as Sung et al. 2022 (arXiv 2206.06522) have them: batch 8, source 128, target 4, r=8, nine of twelve blocks
in both stacks, on a bf16 backbone, with every way of keeping taps; beside LoRA and full fine-tuning in float32.
"""

from __future__ import annotations

import functools
import gc
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.memory import peak_bytes
from benchmarks.peers import (
    BATCH,
    PlainLadder,
    bert_base,
    full,
    ladder,
    lora,
    pairs_batch,
    t5_base,
    t5_lora,
    text_batch,
    training_step,
)
from tlfast.bench.measure import hook_bytes, saved_bytes

MIB = 2**20
T5_BATCH, T5_BLOCKS = 8, [1, 2, 3, 5, 6, 7, 9, 10, 11]
STORAGES = ("keep", "int8", "project", "stream")
PROCESS_ROUNDS = 3


def test_growth_of_a_process(benchmark):
    """First of all: what the others leave in this process would not be there for those it starts."""
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("peaks are read from Linux's /proc")
    methods = [*(storage for storage in STORAGES if storage != "project"), "keep:bf16", "stream:bf16", "lora", "full"]
    found = {method: [] for method in methods}
    for _ in range(PROCESS_ROUNDS):
        for method in methods:
            found[method].append(_growth(method) / MIB)
    benchmark.pedantic(_growth, args=("keep",), rounds=1)
    medians = {method: statistics.median(values) for method, values in found.items()}
    benchmark.extra_info.update(mib=medians, rounds=found)
    benchmark.extra_info["row"] = {
        "what": "Growth of a process in training beyond its model, bert-base, 32 x 128, r=8, fp32",
        "ours": ", ".join(f"{method} {medians[method]:.0f}" for method in methods[:-2]) + " MiB",
        "peer": f"LoRA r=8 {medians['lora']:.0f} MiB ({medians['lora'] / medians['keep']:.1f} of keep), full "
        f"{medians['full']:.0f} MiB ({medians['full'] / medians['keep']:.1f})",
        "how": "tlfast bench ladder_memory",
    }


def _growth(method: str) -> int:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "benchmarks.step_memory", method]
    return int(subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split()[-1])


def _per_sample(measure, model, batch, samples=BATCH) -> float:
    """MiB a sample kept by one training forward, after a warm-up step."""

    def forward():
        return model(**batch)

    result = forward()
    (result if hasattr(result, "backward") else result.loss).backward()
    model.zero_grad(set_to_none=True)
    return measure(forward) / samples / MIB


def test_saved_for_backward(benchmark):
    batch, ours = text_batch(), ladder(bert_base())
    models = {
        "ladder": ours,
        "plain PyTorch ladder": PlainLadder(bert_base()).train(),
        "peft LoRA": lora(),
        "full fine-tuning": full(),
    }
    saved = {name: _per_sample(saved_bytes, model, batch) for name, model in models.items()}
    hooks = {name: _per_sample(hook_bytes, model, batch) for name, model in models.items()}
    benchmark.pedantic(lambda: ours(**batch), rounds=3)
    benchmark.extra_info["saved_mib_per_sample"] = saved
    benchmark.extra_info["hook_mib_per_sample"] = hooks
    benchmark.extra_info["row"] = {
        "what": "Saved for backward a sample, bert-base, 128 tokens, r=8, dropout 0.1, fp32",
        "ours": f"{saved['ladder']:.1f} MiB",
        "peer": f"LoRA r=8 {saved['peft LoRA']:.0f}, full {saved['full fine-tuning']:.0f}, "
        f"plain PyTorch ladder {saved['plain PyTorch ladder']:.1f} MiB",
        "how": "tlfast bench ladder_memory",
    }


def _memory_of_t5(model) -> dict[str, float]:
    """MiB: kept for backward a sample, by the profiler and by hooks, and the peak of a step beyond the weights.

    The step is the first of its optimizer, which makes its states then; calibration and caches are there before.
    """
    gc.collect()  # a model before it may refer to itself
    batch = pairs_batch(T5_BATCH, 128, 4)
    saved, hooks = (_per_sample(measure, model, batch, T5_BATCH) for measure in (saved_bytes, hook_bytes))
    return {"saved": saved, "hooks": hooks, "peak": peak_bytes(training_step(model, batch)) / MIB}


@functools.cache
def _peers_of_t5() -> dict[str, dict[str, float]]:
    """Each in its turn: they would not all fit together."""
    makers = {
        "LoRA r=32": t5_lora,
        "LoRA r=32, checkpointed": functools.partial(t5_lora, checkpointed=True),
        "full": lambda: t5_base().train(),
    }
    found = {name: _memory_of_t5(make()) for name, make in makers.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name in ("LoRA r=32", "LoRA r=32, checkpointed"):
            found[f"{name}, bf16 autocast"] = _memory_of_t5(makers[name]())
    return found


@pytest.mark.parametrize("storage", STORAGES)
def test_tap_storages_on_t5_base(benchmark, storage):
    ours = ladder(t5_base(), "seq2seq-lm", "bf16", tap_storage=storage, layers=T5_BLOCKS, dropout=0.1)
    memory, peers = _memory_of_t5(ours), _peers_of_t5()
    batch = pairs_batch(T5_BATCH, 128, 4)
    benchmark.pedantic(lambda: ours(**batch).loss.backward(), rounds=3)
    best = min(peers, key=lambda name: peers[name]["peak"] if "LoRA" in name else float("inf"))
    benchmark.extra_info.update(mib=memory, peers_mib=peers)
    benchmark.extra_info["row"] = {
        "what": f"Saved for backward a sample (peak of a step beyond the weights), T5-base, 8 x 128 + 4, {storage}",
        "ours": f"{memory['saved']:.2f} MiB ({memory['peak']:.0f} MiB)",
        "peer": ", ".join(
            f"{name} {peers[name]['saved']:.0f} ({peers[name]['peak']:.0f}) MiB"
            for name in dict.fromkeys(("LoRA r=32", best, "full"))
        ),
        "how": "tlfast bench ladder_memory",
    }
