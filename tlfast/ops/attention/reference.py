"""The formula of attention in plain PyTorch."""

from __future__ import annotations

import torch

from ..dropout import keep_mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> torch.Tensor:
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if bias is not None:
        scores = scores + bias
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril(k.shape[1] - q.shape[1])
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    # softmax of a row without an allowed key is NaN: give it a score, and weight nothing by it
    probabilities = scores.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(-1, keepdim=True)
    probabilities = probabilities.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if seed is not None:
        rows = torch.arange(probabilities[..., 0].numel(), device=q.device).view(probabilities.shape[:-1])
        keep = keep_mask(dropout_p, seed, rows, k.shape[1])
        probabilities = probabilities * keep / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", probabilities.to(v.dtype), v).contiguous()
