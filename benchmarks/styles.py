"""One model of each architecture at real dimensions, random weights: how it is built, fed, and what trains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, TaskType
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.peers import SEQUENCE

TARGET = 4  # tokens an encoder-decoder writes: the answer of a classification task
T5_BLOCKS = (1, 2, 3, 5, 6, 7, 9, 10, 11)  # Sung et al. 2022, section 4.2: every fourth side block dropped
_QWEN2_HALF_BILLION: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Style:
    """make: the model with its head. lora: where peft puts it by itself. ladder: settings beside the reduction."""

    name: str
    make: Callable[[], nn.Module]
    task: str
    batch: int
    lora: LoraConfig
    ladder: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> dict[str, torch.Tensor]:
        """One batch with labels, random and of full length."""
        generator = torch.Generator().manual_seed(0)

        def tokens(length: int) -> torch.Tensor:
            return torch.randint(5, 30_000, (self.batch, length), generator=generator)

        classes = torch.randint(2, (self.batch,), generator=generator)
        if self.task == "image-classification":
            return {"pixel_values": torch.randn(self.batch, 3, 224, 224, generator=generator), "labels": classes}
        ids = tokens(SEQUENCE)
        labels = {"causal-lm": ids, "seq2seq-lm": tokens(TARGET)}.get(self.task, classes)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _lora(task: TaskType | None, *targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules=list(targets), **settings)


def _t5_base() -> T5ForConditionalGeneration:
    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


STYLES = (
    Style(
        "bert-base",
        lambda: BertForSequenceClassification(BertConfig()),
        "sequence-classification",
        8,
        _lora(TaskType.SEQ_CLS, "query", "value"),
    ),
    Style("T5-base", _t5_base, "seq2seq-lm", 8, _lora(TaskType.SEQ_2_SEQ_LM, "q", "v"), {"layers": T5_BLOCKS}),
    Style("GPT-2", lambda: GPT2LMHeadModel(GPT2Config()), "causal-lm", 8, _lora(TaskType.CAUSAL_LM, "c_attn")),
    Style(
        "Qwen2-0.5B",
        lambda: Qwen2ForCausalLM(Qwen2Config(**_QWEN2_HALF_BILLION)),
        "causal-lm",
        4,
        _lora(TaskType.CAUSAL_LM, "q_proj", "v_proj"),
    ),
    Style(
        "ViT-base",
        lambda: ViTForImageClassification(ViTConfig()),
        "image-classification",
        8,
        _lora(None, "q_proj", "v_proj", modules_to_save=["classifier"]),
    ),
)
