"""Rows of the peers against what real models keep: transformers', with peft's LoRA."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from benchmarks.memory import peak_bytes
from tests.planning.cases import BATCH, CONFIGS, batch_of, job_of, model_of, task_of
from tlfast.bench.measure import saved_bytes
from tlfast.planning import outline, peer_rows

peft = pytest.importorskip("peft")

RANK = 4
TARGETS = {"bert": ["query", "value"], "vit": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["q", "v"]}
TARGETS |= {"llama": ["q_proj", "v_proj"], "bart": ["q_proj", "v_proj"]}


@functools.cache
def peers(family: str) -> dict[str, Any]:
    """The rows by method and dtype."""
    found = peer_rows(outline(CONFIGS[family], job_of(family)), ["fp32", "bf16"], RANK)
    return {f"{row.method} {row.setting['precision']}": row for row in found}


def adapted(model: Any, family: str) -> Any:
    saved = ["classifier"] if "classification" in task_of(family) else None
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS[family], modules_to_save=saved)
    return peft.get_peft_model(model, config)


def measured(model: Any, batch: dict[str, torch.Tensor], dtype: str) -> tuple[int, int]:
    """What a training forward keeps, and the most that it and its backward hold."""

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return model(**batch)

    model.train()
    forward().loss.backward()
    model.zero_grad(set_to_none=True)
    saved = saved_bytes(forward)
    model.zero_grad(set_to_none=True)
    return saved, peak_bytes(lambda: forward().loss.backward())


@pytest.mark.parametrize(
    "family, dtype",
    [*((family, "fp32") for family in TARGETS), *((family, "bf16") for family in ("bert", "llama", "t5"))],
)
def test_saved_bytes_and_peak_are_those_of_the_real_model(family, dtype):
    rows, batch = peers(family), batch_of(family)
    model = model_of(family)

    def check(name: str, model: Any) -> None:
        row = rows[f"{name} {dtype}"]
        saved, peak = measured(model, batch, dtype)
        assert abs(row.saved - saved) <= 0.2 * saved, (name, row.saved, saved)
        assert abs(row.peak - row.optimizer - peak) <= 0.2 * peak, (name, row.peak - row.optimizer, peak)
        assert abs(row.trained - sum(p.numel() for p in model.parameters() if p.requires_grad)) <= 0.1 * row.trained

    check("full fine-tuning", copy.deepcopy(model))
    lora = adapted(model if dtype == "fp32" else model.bfloat16(), family)
    check(f"LoRA r={RANK}", lora)
    lora.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    check(f"LoRA r={RANK}, checkpointing", lora)


def test_a_linear_probe_keeps_next_to_nothing():
    rows = peers("bert")
    for dtype in ("fp32", "bf16"):
        probe, lora = rows[f"linear probe {dtype}"], rows[f"LoRA r={RANK} {dtype}"]
        assert probe.saved < 16 * BATCH * 192 and probe.saved < lora.saved / 100
        assert probe.trained == 2 * 192 + 2 and probe.weights < lora.weights


def test_only_classifiers_have_a_linear_probe():
    assert not [name for name in peers("llama") if "probe" in name]


def test_targets_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="targets: no linear layer is called wings"):
        peer_rows(outline(CONFIGS["bert"], job_of("bert")), ["fp32"], RANK, ["wings"])


def test_a_deep_model_is_its_first_blocks_and_as_many_more():
    """What is not traced is added: twelve blocks cost three times what four do, less what is outside of them."""
    saved = {}
    for blocks in (2, 4, 12):
        config = copy.deepcopy(CONFIGS["t5"])
        config.num_layers = config.num_decoder_layers = blocks
        row = peer_rows(outline(config, job_of("t5")), ["fp32"], RANK)[0]
        saved[blocks] = row.saved
    assert saved[12] - saved[4] == 4 * (saved[4] - saved[2])
