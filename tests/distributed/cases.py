"""Small ladders and batches of three tasks, and the training loop that one process or one of two runs on them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import tlfast
from tlfast import LadderConfig, LadderModel

VOCABULARY, ROWS, PAD, IGNORED = 97, 8, 0, -100
_BERT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
_GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
_T5 = {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0}
TASKS = {
    "sequence-classification": (transformers.AutoModel, transformers.BertConfig(vocab_size=VOCABULARY, **_BERT)),
    "causal-lm": (transformers.AutoModelForCausalLM, transformers.GPT2Config(vocab_size=VOCABULARY, **_GPT2)),
    "seq2seq-lm": (transformers.AutoModelForSeq2SeqLM, transformers.T5Config(vocab_size=VOCABULARY, **_T5)),
}


def backbone(task: str, seed: int = 0) -> nn.Module:
    """A random model for the task, its weights spread so that its blocks really differ."""
    torch.manual_seed(seed)
    loader, config = TASKS[task]
    model = loader.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def ladder(task: str, seed: int = 0, **settings: Any) -> LadderModel:
    """A ladder without dropout on the task's backbone; seed is of what the side network draws."""
    frozen = tlfast.freeze(backbone(task))
    torch.manual_seed(seed)
    return LadderModel(frozen, task=task, config=LadderConfig(reduction=2, dropout=0.0, **settings))


def batch(task: str, seed: int) -> dict[str, torch.Tensor]:
    """Right-padded rows of many lengths; of the language models' labels each row has another share."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.randint(4, longest + 1, (ROWS, 1), generator=generator)
        ids = torch.randint(2, VOCABULARY, (ROWS, longest), generator=generator)
        return ids, torch.arange(longest) < lengths

    ids, mask = tokens(16)
    inputs = {"input_ids": ids.where(mask, PAD), "attention_mask": mask.long()}
    if task == "sequence-classification":
        return inputs | {"labels": torch.randint(0, 2, (ROWS,), generator=generator)}
    if task == "causal-lm":
        prompt = torch.arange(16) < torch.randint(0, 4, (ROWS, 1), generator=generator)
        return inputs | {"labels": ids.where(mask & ~prompt, IGNORED)}
    targets, target_mask = tokens(9)
    return inputs | {"labels": targets.where(target_mask, IGNORED)}


def step_batch(task: str, step: int) -> dict[str, torch.Tensor]:
    """The global batch of a training step: five of them, over and over."""
    return batch(task, step % 5)


def share(rows: dict[str, torch.Tensor], rank: int, count: int) -> dict[str, torch.Tensor]:
    """The rows of one of `count` processes, without the columns that only others need."""
    mine = {name: value.chunk(count)[rank] for name, value in rows.items()}
    longest = int(mine["attention_mask"].sum(1).max())
    return {n: v[:, :longest] if v.shape == mine["input_ids"].shape else v for n, v in mine.items()}


def label_tokens(task: str, labels: torch.Tensor) -> int | None:
    """What a step's loss is divided by: the labels that are predicted; None for the mean over rows."""
    if task == "sequence-classification":
        return None
    return int((labels[:, 1:] if task == "causal-lm" else labels).ne(IGNORED).sum())


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def train(model: nn.Module, task: str, steps: int, rank: int = 0, count: int = 1) -> list[float]:
    """The losses of `steps` AdamW steps on global batches, of which each process takes its share."""
    optim = optimizer(model.train())
    losses = []
    for step in range(steps):
        rows = step_batch(task, step)
        items = label_tokens(task, rows["labels"])
        loss = model(**share(rows, rank, count), num_items_in_batch=items).loss
        if items is not None:
            loss = loss * count  # DistributedDataParallel takes the mean over processes, and this is to be the sum
        loss.backward()
        optim.step()
        optim.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def side_weights(model: nn.Module) -> dict[str, Any]:
    """The trained weights as NumPy arrays, which travel between processes without shared memory."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}
