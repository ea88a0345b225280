"""The attention layers of a side block: of a sequence to itself, and of a decoder to what its encoder gave."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..backbone.parts import BlockSpec
from ..ops import attention
from ..ops.rotation import rotated

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (B or 1, S, 1, head_dim)


class SideAttention(nn.Module):
    """Multi-head attention of a sequence to itself, in one projection: queries, then keys, then values.

    forward(x, key_mask, bias, rotation, dropout_p, seed, cache): x (B, S, R); key_mask (B, past + S) bool, True where
    a token is; bias (1, H, S, past + S) is added to the scores; rotation turns queries and keys; cache holds the keys
    and values of the past. Returns (B, S, R).
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.heads * spec.head_dim
        self.qkv = nn.Linear(spec.width, inner + 2 * spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.output = nn.Linear(inner, spec.width, bias=spec.bias)
        self.query_norm = nn.RMSNorm(spec.head_dim, eps=spec.eps) if spec.qk_norm else None
        self.key_norm = nn.RMSNorm(spec.head_dim, eps=spec.eps) if spec.qk_norm else None

    def forward(
        self,
        x: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        rotation: Rotation | None = None,
        dropout_p: float = 0.0,
        seed: torch.Tensor | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        spec = self.spec
        heads = self.qkv(x).view(*x.shape[:-1], spec.heads + 2 * spec.kv_heads, spec.head_dim)
        both, v = heads.split((spec.heads + spec.kv_heads, spec.kv_heads), dim=-2)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = both.split((spec.heads, spec.kv_heads), dim=-2)
            # under autocast norms compute in float32
            both = torch.cat((self.query_norm(q), self.key_norm(k)), dim=-2).to(v.dtype)
        if rotation is not None:
            both = rotated(both, *rotation)
        q, k = both.split((spec.heads, spec.kv_heads), dim=-2)
        if cache is not None:
            k, v = cache.extend(k, v)
        attended = attention(
            q,
            _for_each_head(k, spec),
            _for_each_head(v, spec),
            bias=bias,
            key_mask=key_mask,
            causal=spec.causal,
            scale=spec.scale,
            dropout_p=dropout_p,
            seed=seed,
        )
        return self.output(attended.flatten(-2))


class SideCrossAttention(nn.Module):
    """Multi-head attention of a decoder's sequence to its encoder's.

    forward(x, memory, memory_mask, dropout_p, seed, cache): x (B, S, R); memory (B, M, R) is the side encoder's normed
    output, memory_mask (B, M) bool. A cache that is filled stands for the memory. Returns (B, S, R).
    """

    def __init__(self, spec: BlockSpec, memory_width: int) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.heads * spec.head_dim
        self.query = nn.Linear(spec.width, inner, bias=spec.qkv_bias)
        self.key_value = nn.Linear(memory_width, 2 * inner, bias=spec.qkv_bias)
        self.output = nn.Linear(inner, spec.width, bias=spec.bias)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        memory_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        seed: torch.Tensor | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        spec = self.spec
        q = self.query(x).unflatten(-1, (spec.heads, spec.head_dim))
        kept = None if cache is None else cache.read()
        if kept is None:
            k, v = self.key_value(memory).unflatten(-1, (2, spec.heads, spec.head_dim)).unbind(-3)
            kept = (k, v) if cache is None else cache.extend(k, v)
        attended = attention(q, *kept, key_mask=memory_mask, scale=spec.scale, dropout_p=dropout_p, seed=seed)
        return self.output(attended.flatten(-2))


def rotation_of(inverse_frequencies: torch.Tensor, positions: torch.Tensor, scaling: float) -> Rotation:
    """Cosines and sines, (B or 1, S, 1, head_dim), of positions (B or 1, S). Su et al. 2021 (arXiv 2104.09864)."""
    angles = positions[..., None].float() * inverse_frequencies
    both = torch.cat((angles, angles), dim=-1)[..., None, :]
    return both.cos() * scaling, both.sin() * scaling


def _for_each_head(x: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """(B, S, kv_heads, head_dim) -> (B, S, heads, head_dim): query heads in a group share keys and values."""
    return x if spec.kv_heads == spec.heads else x.repeat_interleave(spec.heads // spec.kv_heads, dim=-2)


def relative_buckets(queries: int, past: int, spec: BlockSpec, device: torch.device | None = None) -> torch.Tensor:
    """(queries, past + queries) int64 buckets of the distance key - query, as T5 counts them.

    Half of a direction's buckets are single distances, the others grow logarithmically up to max_distance.
    Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1, and its code.
    """
    query = torch.arange(past, past + queries, device=device)[:, None]
    distance = torch.arange(past + queries, device=device)[None] - query
    buckets, offset = spec.buckets, torch.zeros_like(distance)
    if spec.causal:
        distance = -distance.clamp(max=0)
    else:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    exact = buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(spec.max_distance / exact)
    far = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """T5's trained bias of the scores by relative position, (1, H, S, past + S); one for all blocks of a stack."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(spec.buckets, spec.heads))

    def forward(self, queries: int, past: int = 0) -> torch.Tensor:
        buckets = relative_buckets(queries, past, self.spec, self.weight.device)
        return F.embedding(buckets, self.weight).permute(2, 0, 1)[None]
