"""The formula of attention of packed sequences in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    starts_k: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    if rotation is not None:
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    spans, spans_k = (pairwise(offsets.tolist()) for offsets in (starts, starts_k))
    for (first, end), (first_k, end_k) in zip(spans, spans_k, strict=True):
        with torch.autocast(q.device.type, enabled=False):
            out[first:end] = _attend(q[first:end], k[first_k:end_k], v[first_k:end_k], scale, causal, window, bias)
    return out


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    queries, keys = q.shape[0], k.shape[0]
    scores = scale * torch.einsum("ihd,jhd->hij", q, k)
    if bias is not None:
        scores = scores + bias[:, :queries, :keys]
    i, j = torch.arange(queries, device=q.device)[:, None], torch.arange(keys, device=q.device)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (j <= i + keys - queries)
    if window is not None:
        seen = seen & ((i - j).abs() <= window)
    blind = ~seen.any(-1, keepdim=True)  # softmax of a row without a key is NaN: give it scores, then zeros
    probabilities = scores.masked_fill(~seen, -torch.inf).masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("hij,jhd->ihd", probabilities, v)


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]
