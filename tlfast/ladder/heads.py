"""Heads: from the side network's output to logits."""

from __future__ import annotations

import torch
from torch import nn

from ..backbone import FrozenBackbone
from .config import LadderConfig

_CLASS_TOKEN = ("vit", "deit", "dinov2", "clip_vision_model")  # their first token is there to be read


class ClassifierHead(nn.Module):
    """logits = W_c dropout(mu * h + (1 - mu) * (W_up s + b_up)) + b_c, mu = sigmoid(alpha / T).

    s is the side network's output and h the backbone's last hidden state, both of a token or pooled over a sequence.
    Without the blend mu is 0 and there is no alpha.
    Source: Sung et al. 2022, section 3.2 (upsampling); Zhang et al. 2024 (QST, arXiv 2401.07159) for the blend.
    """

    def __init__(self, width: int, side_width: int, num_labels: int, config: LadderConfig, dropout: float) -> None:
        super().__init__()
        self.temperature = config.gate_temperature
        self.up = nn.Linear(side_width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)
        self.alpha = nn.Parameter(torch.zeros(())) if config.blend else None

    def _logits(self, side: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        hidden = self.up(side)
        if self.alpha is not None:
            mu = torch.sigmoid(self.alpha / self.temperature)
            hidden = mu * last + (1 - mu) * hidden
        return self.classifier(self.dropout(hidden))


class SequenceHead(ClassifierHead):
    """One vector of logits for a sequence, from its pooled states.

    forward(side, last, mask): side (B, S, R), last (B, S, D), mask (B, S) bool. Returns (B, num_labels).
    """

    def __init__(self, width: int, side_width: int, num_labels: int, config: LadderConfig, dropout: float) -> None:
        super().__init__(width, side_width, num_labels, config, dropout)
        self.pooling = config.pooling

    def forward(self, side: torch.Tensor, last: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._logits(pool(side, mask, self.pooling), pool(last, mask, self.pooling))


class TokenHead(ClassifierHead):
    """Logits for every token. forward(side, last, mask) as `SequenceHead`; returns (B, S, num_labels)."""

    def forward(self, side: torch.Tensor, last: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._logits(side, last)


class LanguageHead(nn.Module):
    """What the frozen language-model head reads: h + W_up s + b_up with the blend, W_up s + b_up without.

    With the blend W_up starts at zero, so that training starts from the backbone's own predictions; without it at
    N(0, 0.01).
    forward(side, last): (B, S, R) and (B, S, D); returns (B, S, D).
    Source: Sung et al. 2022, section 3.2 (without the blend).
    """

    def __init__(self, width: int, side_width: int, config: LadderConfig) -> None:
        super().__init__()
        self.blend = config.blend
        self.up = nn.Linear(side_width, width)
        nn.init.normal_(self.up.weight, std=0.0 if config.blend else 0.01)
        nn.init.zeros_(self.up.bias)

    def forward(self, side: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        hidden = self.up(side)
        return last + hidden if self.blend else hidden


def pool(x: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """(B, S, D) -> (B, D): the "mean" over tokens, the first ("cls") or the "last" one. No token gives zeros."""
    if pooling in ("cls", "last") and mask.shape[1]:
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        chosen = (mask * (positions if pooling == "last" else positions.flip(0))).argmax(dim=1)
        return x[torch.arange(x.shape[0], device=x.device), chosen] * mask.any(dim=1, keepdim=True)
    weights = mask.to(x.dtype)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.einsum("bs,bsd->bd", weights, x)


def default_pooling(backbone: FrozenBackbone) -> str:
    """The "last" token of a causal model, which alone has seen all; a vision model's class token; else the "mean"."""
    if not backbone.is_encoder_decoder and backbone.block_spec.causal:
        return "last"
    return "cls" if backbone.model_type in _CLASS_TOKEN else "mean"
