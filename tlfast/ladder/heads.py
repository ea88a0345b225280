"""Heads: from the side network's output to logits and a loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .config import LadderConfig

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


class SequenceHead(nn.Module):
    """logits = W_c dropout(mu * pool(backbone) + (1 - mu) * (W_up pool(side) + b_up)) + b_c, mu = sigmoid(alpha / T).

    forward(side, last, mask): side (B, S, R), last (B, S, D) the backbone's last hidden state, mask (B, S) bool.
    Returns (B, num_labels). Without the blend mu is 0 and there is no alpha.
    Source: Sung et al. 2022, section 3.2 (upsampling); Zhang et al. 2024 (QST, arXiv 2401.07159) for the blend.
    """

    def __init__(self, width: int, side_width: int, num_labels: int, config: LadderConfig, dropout: float) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.temperature = config.gate_temperature
        self.up = nn.Linear(side_width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)
        self.alpha = nn.Parameter(torch.zeros(())) if config.blend else None

    def forward(self, side: torch.Tensor, last: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        pooled = self.up(pool(side, mask, self.pooling))
        if self.alpha is not None:
            mu = torch.sigmoid(self.alpha / self.temperature)
            pooled = mu * pool(last, mask, self.pooling) + (1 - mu) * pooled
        return self.classifier(self.dropout(pooled))


def pool(x: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """(B, S, D) -> (B, D): the mean over tokens, or the first token ("cls"). A row without tokens gives zeros."""
    if pooling == "cls":
        return x[:, 0] * mask[:, :1]
    weights = mask.to(x.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bs,bsd->bd", weights, x)


def problem_type(labels: torch.Tensor, num_labels: int, given: str | None) -> str:
    """transformers' rule: one output is regression; integer labels are classes; anything else is multi-label."""
    if given is not None:
        return given
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def sequence_loss(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> torch.Tensor:
    """Mean cross-entropy, binary cross-entropy or squared error, in float32."""
    logits = logits.float()
    if problem == "regression":
        if labels.numel() != logits.numel():
            raise ValueError(f"labels: shape {tuple(labels.shape)} does not fit logits of shape {tuple(logits.shape)}")
        return F.mse_loss(logits.reshape(-1), labels.reshape(-1).float())
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels.reshape(-1))
