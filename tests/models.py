"""Small random backbones of every family, and batches for them."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

VOCABULARY = 97
COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 70,
    "pad_token_id": 1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**COMMON),
    "roberta": RobertaConfig(**COMMON),
    "xlm-roberta": XLMRobertaConfig(**COMMON),
    "camembert": CamembertConfig(**COMMON),
    "distilbert": DistilBertConfig(
        dim=48, n_layers=3, n_heads=3, hidden_dim=96, vocab_size=VOCABULARY, max_position_embeddings=70, pad_token_id=1
    ),
}


def tiny(family: str = "bert", seed: int = 0) -> nn.Module:
    """A small random model; its weights are spread wider than at initialisation so that layers really differ."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch(sizes: tuple[int, ...] = (9, 5, 12), labels: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded random token ids with their mask; labels below `labels` if asked for."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sizes, default=0)
    ids = torch.randint(2, VOCABULARY, (len(sizes), length), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor(sizes, dtype=torch.int64)[:, None]
    inputs = {"input_ids": ids.where(mask, torch.tensor(1)), "attention_mask": mask.long()}
    if labels is not None:
        inputs["labels"] = torch.randint(0, labels, (len(sizes),), generator=generator)
    return inputs


def digest(model: nn.Module) -> str:
    """A hash of every parameter and buffer, to see that training changed none."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
