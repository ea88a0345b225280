"""What the ladder is measured against, each built the way its own documentation says, and shared set-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import tlfast

BATCH, SEQUENCE, REDUCTION = 16, 128, 8


def bert_base(seed: int = 0) -> BertModel:
    """bert-base dimensions, random weights."""
    torch.manual_seed(seed)
    return BertModel(BertConfig()).eval()


def t5_base(seed: int = 0) -> T5ForConditionalGeneration:
    """T5-base dimensions, random weights."""
    torch.manual_seed(seed)
    sizes = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def pairs_batch(batch: int, source: int, target: int, vocabulary: int = 32_000) -> dict[str, torch.Tensor]:
    """Full-length random source and target tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(5, vocabulary, (batch, source), generator=generator),
        "attention_mask": torch.ones(batch, source, dtype=torch.long),
        "labels": torch.randint(5, vocabulary, (batch, target), generator=generator),
    }


def text_batch(batch: int = BATCH, sequence: int = SEQUENCE, vocabulary: int = 30_000) -> dict[str, torch.Tensor]:
    """Full-length random tokens with labels."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(5, vocabulary, (batch, sequence), generator=generator),
        "attention_mask": torch.ones(batch, sequence, dtype=torch.long),
        "labels": torch.randint(0, 2, (batch,), generator=generator),
    }


def ladder(
    backbone: nn.Module, task: str = "sequence-classification", precision: str = "fp32", **settings: Any
) -> tlfast.LadderModel:
    """Ours, in train mode with the backbone's own dropout."""
    config = tlfast.LadderConfig(**{"reduction": REDUCTION, "init": "random", **settings})
    return tlfast.LadderModel(tlfast.freeze(backbone, precision), task, config=config).train()


def lora(rank: int = 8, seed: int = 0) -> nn.Module:
    """peft LoRA on query and value of bert-base, with a trained classifier."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(BertConfig())
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=16, target_modules=["query", "value"])
    return get_peft_model(model, config).train()


def t5_lora(rank: int = 32, checkpointed: bool = False) -> nn.Module:
    """peft LoRA on query and value of T5-base; checkpointed: each block keeps its input alone."""
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=rank, lora_alpha=rank, target_modules=["q", "v"])
    model = get_peft_model(t5_base(), config).train()
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def full(seed: int = 0) -> nn.Module:
    """Full fine-tuning of bert-base."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(BertConfig()).train()


class LinearProbe(nn.Module):
    """A classifier on the frozen model's mean hidden state: the least that can be trained."""

    def __init__(self, backbone: BertModel, labels: int = 2) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.classifier = nn.Linear(backbone.config.hidden_size, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.backbone.eval()
        with torch.no_grad():
            last = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.cross_entropy(self.classifier(last.float().mean(dim=1)), labels)


class PlainLadder(nn.Module):
    """The same ladder in plain PyTorch modules, as one would write it without tlfast: no op, no recompute."""

    def __init__(self, backbone: BertModel, reduction: int = REDUCTION, labels: int = 2) -> None:
        super().__init__()
        config = backbone.config
        self.backbone = backbone.requires_grad_(False)
        width = config.hidden_size // reduction
        count = config.num_hidden_layers
        self.embedding = nn.Linear(config.hidden_size, width)
        self.down = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in range(count))
        self.alpha = nn.Parameter(torch.zeros(count))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.num_attention_heads,
                config.intermediate_size // reduction,
                config.hidden_dropout_prob,
                activation="gelu",
                batch_first=True,
            )
            for _ in range(count)
        )
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.backbone.eval()
        with torch.no_grad():
            output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        hidden_states = [hidden.float() for hidden in output.hidden_states]  # a backbone in bfloat16 gives such taps
        s = self.embedding(hidden_states[0])
        padding = ~attention_mask.bool()
        for tap, down, alpha, block in zip(hidden_states[1:], self.down, self.alpha, self.blocks, strict=True):
            mu = torch.sigmoid(alpha / 0.1)
            s = block(mu * s + (1 - mu) * down(tap), src_key_padding_mask=padding)
        pooled = (hidden_states[-1] + self.up(self.norm(s))).mean(dim=1)
        return F.cross_entropy(self.classifier(pooled), labels)


def training_step(
    model: Callable[..., Any], batch: dict[str, torch.Tensor], autocast: bool = False
) -> Callable[[], None]:
    """Forward (autocast: in bfloat16), backward, fused AdamW. model: a module, or what torch.compile makes of one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = model(**batch)
        (result if isinstance(result, torch.Tensor) else result.loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
