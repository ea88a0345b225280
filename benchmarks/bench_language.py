"""A small language model of Python code, taken to prose: ladder, LoRA and full fine-tuning at equal steps.

The backbone is a byte-level GPT-2 pre-trained here; the prose is that of PyTorch's docstrings, split by file. Dev
chooses each method's rate from one grid; the test files are read once, after that.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

import tlfast
from benchmarks import pretrain
from benchmarks.loop import Columns, Tuned, mean_loss, shuffled_batches, train, tune
from tlfast.bench.measure import saved_bytes

TEST_FILES, DEV_FILES, TRAIN_FILES = 200, 100, 800
STEPS, BATCH, RATES = 120, 8, (1e-3, 3e-3, 1e-2)
LONGER = 2  # times the steps: what the ladder does with about the time that LoRA takes
REDUCTION, INIT, CALIBRATION = 4, "pca", 32
_LONGER = f"ladder, {LONGER * STEPS} steps"
MIB = 2**20


def _ladder(backbone: nn.Module, train_data: Columns) -> tlfast.LadderModel:
    config = tlfast.LadderConfig(reduction=REDUCTION, init=INIT)
    batch = {"input_ids": train_data["input_ids"][:CALIBRATION]}
    return tlfast.LadderModel(tlfast.freeze(backbone), task="causal-lm", config=config, calibration=[batch])


def _lora(backbone: nn.Module) -> nn.Module:
    """On every linear layer, which serves it best."""
    layers = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=layers, fan_in_fan_out=True)
    return get_peft_model(copy.deepcopy(backbone).requires_grad_(True), config)


def _kept(model: nn.Module, batch: Columns) -> float:
    """Bytes a sample that a training forward keeps."""
    model.train()
    kept = saved_bytes(lambda: model(**batch)) / BATCH
    model.eval()
    return kept


def test_language(benchmark: Any) -> None:
    test, dev, train_data = map(pretrain.blocks, pretrain.torch_prose((TEST_FILES, DEV_FILES, TRAIN_FILES)))
    backbone = pretrain.byte_gpt2()
    makers = {
        "ladder": lambda: _ladder(backbone, train_data),
        "LoRA": lambda: _lora(backbone),
        "full fine-tuning": lambda: copy.deepcopy(backbone).requires_grad_(True),
    }
    untrained = makers["ladder"]()
    first = {name: column[:BATCH] for name, column in test.items()}
    torch.testing.assert_close(untrained(**first).logits, backbone(**first).logits)

    def run() -> dict[str, Tuned]:
        def fit(model: nn.Module, rate: float, steps: int = STEPS) -> float:
            return train(model, shuffled_batches(train_data, BATCH, steps), steps, rate)

        def score(model: nn.Module) -> float:
            return -mean_loss(model, dev)

        tuned = {name: tune(make, RATES, fit, score) for name, make in makers.items()}
        longer = functools.partial(fit, steps=LONGER * STEPS)
        tuned[_LONGER] = tune(makers["ladder"], [tuned["ladder"].rate], longer, score)
        return tuned

    tuned = benchmark.pedantic(run, rounds=1)
    before = mean_loss(backbone, test)
    found = {
        name: {
            "loss_per_byte": mean_loss(result.model, test),
            "dev_loss_by_rate": {str(rate): -score for rate, score in result.scores.items()},
            "rate": result.rate,
            "step_seconds": result.step_seconds,
            "saved_bytes_per_sample": _kept(result.model, first),
            "trained_parameters": sum(p.numel() for p in result.model.parameters() if p.requires_grad),
        }
        for name, result in tuned.items()
    }
    benchmark.extra_info["loss_per_byte_before"] = before
    benchmark.extra_info["methods"] = found
    figures = {
        name: f"{name} {math.exp(figure['loss_per_byte']):.2f} ({1e3 * figure['step_seconds']:.0f} ms a step, keeps "
        f"{figure['saved_bytes_per_sample'] / MIB:.1f} MiB a sample)"
        for name, figure in found.items()
    }
    benchmark.extra_info["row"] = {
        "what": f"Perplexity a byte on held-out prose, byte-level GPT-2 of code (before: {math.exp(before):.2f}), "
        f"{STEPS} steps of {BATCH} x {pretrain.CONTEXT}, r={REDUCTION}",
        "ours": "; ".join(figures.pop(name) for name in ("ladder", _LONGER)),
        "peer": "; ".join(figures.values()),
        "how": "tlfast bench language",
    }
