"""The two reductions in plain PyTorch, with their map of scores."""

from __future__ import annotations

import torch

Softmax = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Sigmoid = tuple[torch.Tensor, torch.Tensor]


def softmax(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int) -> Softmax:
    others, own = _scores(u, v, scale, offset)
    return others.logsumexp(1), others.logsumexp(0), own


def sigmoid(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int) -> Sigmoid:
    others, own = _scores(u, v, scale, offset)
    # logaddexp(0, x) is softplus(x) without the threshold of F.softplus
    return torch.logaddexp(others.new_zeros(()), others + bias).sum(1), own


def _scores(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The map (N, M) with -inf in place of own pairs, and those."""
    wide = torch.promote_types(u.dtype, torch.float32)
    scores = scale.to(wide) * (u.to(wide) @ v.to(wide).T)
    own = scores.diagonal(offset)[: u.shape[0]]
    return scores.diagonal_scatter(torch.full_like(own, -torch.inf), offset), own
