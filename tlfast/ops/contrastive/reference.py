"""The two reductions in plain PyTorch, with their map of scores."""

from __future__ import annotations

import torch

Softmax = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Sigmoid = tuple[torch.Tensor, torch.Tensor]


def softmax(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int) -> Softmax:
    scores = _scores(u, v, scale)
    own = scores.diagonal(offset)[: u.shape[0]]
    others = scores.diagonal_scatter(torch.full_like(own, -torch.inf), offset)
    return others.logsumexp(1), others.logsumexp(0), own


def sigmoid(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int) -> Sigmoid:
    scores = _scores(u, v, scale)
    own = scores.diagonal(offset)[: u.shape[0]]
    # logaddexp(0, x) is softplus(x) without the threshold of F.softplus
    softplus = torch.logaddexp(scores.new_zeros(()), scores + bias)
    return softplus.diagonal_scatter(torch.zeros_like(own), offset).sum(1), own


def _scores(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(u.dtype, torch.float32)
    return scale.to(wide) * (u.to(wide) @ v.to(wide).T)
