"""Attention of packed sequences by PyTorch's fused kernels: one call for all sequences of a length."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F


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
    if rotation is not None:
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for (queries, keys), (firsts, firsts_k) in _by_length(starts.tolist(), starts_k.tolist()).items():
        if queries == 0 or keys == 0:
            continue
        simple = causal and queries == keys and window is None and bias is None
        mask, sees_a_key = (None, None) if simple else _mask(queries, keys, causal, window, bias, q)
        with torch.autocast(q.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(
                _take(q, firsts, queries).transpose(1, 2),
                _take(k, firsts_k, keys).transpose(1, 2),
                _take(v, firsts_k, keys).transpose(1, 2),
                attn_mask=mask,
                is_causal=simple,
                scale=scale,
            ).transpose(1, 2)
        if sees_a_key is not None:
            attended = torch.where(sees_a_key[:, None, None], attended, 0)
        _put(out, firsts, queries, attended)
    return out


def _by_length(starts: list[int], starts_k: list[int]) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(queries, keys) -> the first tokens of q and of k of the sequences of those lengths."""
    buckets: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for (first, end), (first_k, end_k) in zip(pairwise(starts), pairwise(starts_k), strict=True):
        firsts, firsts_k = buckets[end - first, end_k - first_k]
        firsts.append(first)
        firsts_k.append(first_k)
    return buckets


def _mask(
    queries: int, keys: int, causal: bool, window: int | None, bias: torch.Tensor | None, like: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What scaled_dot_product_attention takes, and which queries see a key (None: all); the others are given all keys,
    for finite numbers."""
    added = None if bias is None else bias[:, :queries, :keys].to(like.dtype)
    if not causal and window is None:
        return added, None
    i, j = torch.arange(queries, device=like.device)[:, None], torch.arange(keys, device=like.device)
    seen = j <= i + keys - queries if causal else torch.ones_like(i + j, dtype=torch.bool)
    if window is not None:
        seen = seen & ((i - j).abs() <= window)
    sees_a_key = seen.any(-1)
    seen = seen | ~sees_a_key[:, None]
    return (seen if added is None else added.masked_fill(~seen, -torch.inf)), sees_a_key


def _is_one_run(firsts: list[int], length: int) -> bool:
    return firsts == list(range(firsts[0], firsts[0] + len(firsts) * length, length))


def _rows(firsts: list[int], length: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(firsts, device=device)[:, None] + torch.arange(length, device=device)


def _take(x: torch.Tensor, firsts: list[int], length: int) -> torch.Tensor:
    """(sequences, length, heads, hd): a view where the sequences lie side by side, as in a batch sorted by length."""
    if _is_one_run(firsts, length):
        return x[firsts[0] : firsts[0] + len(firsts) * length].unflatten(0, (len(firsts), length))
    return x[_rows(firsts, length, x.device)]


def _put(out: torch.Tensor, firsts: list[int], length: int, values: torch.Tensor) -> None:
    if _is_one_run(firsts, length):
        out[firsts[0] : firsts[0] + len(firsts) * length] = values.flatten(0, 1)
    else:
        out[_rows(firsts, length, out.device)] = values


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = x * cosines[:, None] + torch.cat((-second, first), dim=-1) * sines[:, None]
    return turned.to(x.dtype)
