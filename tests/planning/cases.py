"""Models of several families, wide enough that what a plan counts outweighs what it leaves out, and full batches."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

import tlfast
from tests.models import TOKENS
from tlfast.planning import Job

BATCH, LENGTH, TARGET, REDUCTION = 4, 64, 8, 4
VOCABULARY = 400
_SIZES = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 512}
_TEXT = _SIZES | TOKENS | {"vocab_size": VOCABULARY, "max_position_embeddings": 80}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 32}
_T5 = {"d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 512, "num_layers": 4, "vocab_size": VOCABULARY}
CONFIGS: dict[str, hf.PreTrainedConfig] = {
    "bert": hf.BertConfig(**_TEXT),
    "distilbert": hf.DistilBertConfig(
        dim=192, n_layers=4, n_heads=6, hidden_dim=512, **(TOKENS | {"vocab_size": VOCABULARY})
    ),
    "modernbert": hf.ModernBertConfig(**_TEXT, cls_token_id=0, sep_token_id=2),
    "vit": hf.ViTConfig(**_SIZES, image_size=32, patch_size=4),
    "gpt2": hf.GPT2Config(
        n_embd=192, n_layer=4, n_head=6, n_inner=512, n_positions=80, **(TOKENS | {"vocab_size": VOCABULARY})
    ),
    "llama": hf.LlamaConfig(**_GROUPED),
    "qwen3": hf.Qwen3Config(**_GROUPED),
    "gemma2": hf.Gemma2Config(**_GROUPED, query_pre_attn_scalar=32),
    "t5": hf.T5Config(**_T5, decoder_start_token_id=0),
    "bart": hf.BartConfig(
        d_model=192,
        encoder_layers=4,
        decoder_layers=3,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=80,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **(TOKENS | {"vocab_size": VOCABULARY}),
    ),
}
TASKS = {"vit": "image-classification", "t5": "seq2seq-lm", "bart": "seq2seq-lm"}
TASKS |= dict.fromkeys(("gpt2", "llama", "qwen3", "gemma2"), "causal-lm")
_AUTO = {
    "sequence-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
    "image-classification": hf.AutoModelForImageClassification,
    "causal-lm": hf.AutoModelForCausalLM,
    "seq2seq-lm": hf.AutoModelForSeq2SeqLM,
}


def task_of(family: str) -> str:
    return TASKS.get(family, "sequence-classification")


def job_of(family: str, task: str | None = None) -> Job:
    return Job(task or task_of(family), BATCH, LENGTH, TARGET if task_of(family) == "seq2seq-lm" else 0)


def model_of(family: str, task: str | None = None) -> Any:
    """A real model with the task's head."""
    torch.manual_seed(0)
    return _AUTO[task or task_of(family)].from_config(CONFIGS[family])


def batch_of(family: str, task: str | None = None) -> dict[str, torch.Tensor]:
    task = task or task_of(family)
    if task == "image-classification":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(0, 2, (BATCH,))}
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    shapes = {"sequence-classification": (BATCH,), "seq2seq-lm": (BATCH, TARGET)}
    labels = torch.randint(0, 2, shapes.get(task, (BATCH, LENGTH)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def ladder_of(family: str, precision: str = "fp32", task: str | None = None, **settings: Any) -> tlfast.LadderModel:
    backbone = tlfast.freeze(model_of(family, task), precision)
    config = tlfast.LadderConfig(**{"reduction": REDUCTION, "init": "random"} | settings)
    return tlfast.LadderModel(backbone, task=task or task_of(family), num_labels=2, config=config).train()
