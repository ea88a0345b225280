"""What a ladder costs when it serves: latency beside the bare model and a LoRA that is merged into it.

A merged LoRA is the bare model with other weights: no adapter is left. A ladder runs its side network after the frozen
forward. Sequence classification of two classes, r=8, all blocks, random ladder and adapter; batch 1 and 32. bert-base
dimensions read 128 tokens; MiniLM-L6 reads SST-2 test sentences of their own lengths, in their order at batch 1 and the
longest first at batch 32. All variants run interleaved in one process; figures are medians of the rounds.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import tlfast
from benchmarks.frozen import Batch
from benchmarks.peers import REDUCTION, text_batch
from benchmarks.runs import text_files
from tlfast.bench.measure import medians, timed_rounds
from tlfast.cli.backbone import MINILM, find_backbone
from tlfast.data import read_examples

PRECISIONS = ("fp32", "bf16", "int8")
SENTENCES = 32  # of SST-2, in one round
ROUNDS = {1: 11, 32: 5}
BARE, MERGED, BARE_BF16, MERGED_BF16 = "bare fp32", "merged LoRA fp32", "bare bf16", "merged LoRA bf16"


@dataclass(frozen=True)
class Served:
    """A classifier in float32, and the batches of a round by size."""

    name: str
    make: Callable[[], nn.Module]
    batches: Callable[[int], list[Batch]]


def _bert_base() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig()).eval()


def _minilm() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(find_backbone(MINILM), num_labels=2).eval()


def _full_length(size: int) -> list[Batch]:
    batch = text_batch(size)
    del batch["labels"]
    return [batch]


@functools.cache
def _sentences(size: int) -> list[Batch]:
    texts = read_examples(text_files("sst2")["test"]).texts[:SENTENCES]
    tokenizer = AutoTokenizer.from_pretrained(find_backbone(MINILM))
    rows = tokenizer(texts, truncation=True)["input_ids"]
    if size > 1:
        rows = sorted(rows, key=len, reverse=True)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [dict(tokenizer.pad({"input_ids": part}, return_tensors="pt")) for part in parts]


CASES = {
    "bert-base": Served("bert-base dimensions, 128 tokens", _bert_base, _full_length),
    "minilm": Served("MiniLM-L6, SST-2 sentences", _minilm, _sentences),
}


def _merged(model: Any) -> nn.Module:
    """LoRA r=8 on queries and values, its product folded into their weights."""
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)  # peft begins with zero, which would merge to nothing
    return adapted.merge_and_unload().eval()


@functools.cache
def _models(case: str) -> dict[str, nn.Module]:
    model = CASES[case].make()

    def make() -> nn.Module:
        return copy.deepcopy(model)

    models = {BARE: model, MERGED: _merged(make()), BARE_BF16: make().bfloat16()}
    models[MERGED_BF16] = _merged(make()).bfloat16()
    config = tlfast.LadderConfig(reduction=REDUCTION, init="random")
    for precision in PRECISIONS:
        backbone = tlfast.freeze(make(), precision)
        models[f"ladder {precision}"] = tlfast.LadderModel(backbone, config=config).eval()
    return models


def _check(models: dict[str, Any], batch: Batch) -> None:
    """The backbone of each ladder sees what the bare model sees, and merging left nothing of LoRA but its effect."""
    with torch.no_grad():
        exact = models[BARE].base_model(**batch).last_hidden_state
        for precision in PRECISIONS:
            found = models[f"ladder {precision}"].backbone(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].bool()
            error = (found[mask] - exact[mask]).norm() / exact[mask].norm()
            assert error <= {"fp32": 1e-4, "bf16": 0.03, "int8": 0.15}[precision], (precision, float(error))
        assert not torch.equal(models[MERGED](**batch).logits, models[BARE](**batch).logits)
    modules = {name: sum(1 for _ in models[name].modules()) for name in (BARE, MERGED)}
    assert modules[BARE] == modules[MERGED]


def _function(model: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        for batch in batches:
            model(**batch)

    return run


@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize("case", CASES)
def test_latency(benchmark: Any, case: str, size: int) -> None:
    models, batches = _models(case), CASES[case].batches(size)
    _check(models, batches[0])
    functions = {name: _function(model, batches) for name, model in models.items()}
    for precision in PRECISIONS:
        backbone = models[f"ladder {precision}"].backbone
        functions[f"frozen {precision}"] = _function(backbone, batches)
    rounds = timed_rounds(functions, ROUNDS[size])
    benchmark.pedantic(functions["ladder fp32"], rounds=1)

    milliseconds = {name: 1e3 * seconds / len(batches) for name, seconds in medians(rounds).items()}
    side = {p: _ratio(rounds[f"ladder {p}"], rounds[f"frozen {p}"]) - 1 for p in PRECISIONS}
    over_merged = {p: _ratio(rounds[f"ladder {p}"], rounds[MERGED if p == "fp32" else MERGED_BF16]) for p in PRECISIONS}
    benchmark.extra_info["milliseconds_a_batch"] = milliseconds
    benchmark.extra_info["side_network_over_frozen_forward"] = side
    benchmark.extra_info["times_merged_lora"] = over_merged
    ours = (f"{p} {milliseconds[f'ladder {p}']:.1f} ms (side network {100 * side[p]:+.0f} %)" for p in PRECISIONS)
    theirs = ("bare fp32", MERGED, BARE_BF16, MERGED_BF16)
    benchmark.extra_info["row"] = {
        "what": f"Latency of a batch of {size}, {CASES[case].name}, r={REDUCTION}, all blocks",
        "ours": ", ".join(ours),
        "peer": ", ".join(f"{name} {milliseconds[name]:.1f} ms" for name in theirs),
        "how": "tlfast bench serving",
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
