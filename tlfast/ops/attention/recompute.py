"""Attention in plain PyTorch, a bounded part of the map at a time, recomputed in the backward: any device and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..dropout import keep_mask
from .autograd import accumulated_in

# Entries of the map that exist at once (16 MiB in float32); one query of one sample where that is more.
MAP_ELEMENTS = 2**22


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    wide = accumulated_in(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty((batch, heads, queries, 2), dtype=wide, device=q.device)
    for b, i in _parts(q, k):
        scores = _scores(q, k, bias, key_mask, causal, scale, b, i)
        maximum = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0)  # no key allowed: exp(-inf - 0) is 0
        probabilities = (scores - maximum.unsqueeze(-1)).exp_()
        total = probabilities.sum(-1)
        reciprocal = torch.where(total == 0, 0, 1 / total)
        statistics[b, :, i] = torch.stack((maximum, reciprocal), -1)
        probabilities *= reciprocal.unsqueeze(-1)
        if seed is not None:
            probabilities *= _dropped(q, k, dropout_p, seed, b, i)
        out[b, i] = torch.einsum("bhij,bjhd->bihd", probabilities, v[b].to(wide)).to(q.dtype)
    return out, statistics


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    wide = statistics.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=q.device) for x in (q, k, v))
    dbias = None
    if bias is not None and need_dbias:
        shape = (bias.shape[0], q.shape[2], q.shape[1], k.shape[1])
        dbias = torch.zeros(shape, dtype=wide, device=q.device)
    for b, i in _parts(q, k):
        g = dout[b, i].to(wide)
        delta = torch.einsum("bihd,bihd->bhi", g, out[b, i].to(wide)).unsqueeze(-1)
        maximum, reciprocal = statistics[b, :, i].unsqueeze(-2).unbind(-1)
        ds = _scores(q, k, bias, key_mask, causal, scale, b, i).sub_(maximum).exp_().mul_(reciprocal)
        dp = torch.einsum("bihd,bjhd->bhij", g, v[b].to(wide))
        if seed is None:
            dv[b] += torch.einsum("bhij,bihd->bjhd", ds, g)
        else:
            kept = _dropped(q, k, dropout_p, seed, b, i)
            dv[b] += torch.einsum("bhij,bihd->bjhd", ds * kept, g)
            dp *= kept
        ds *= dp.sub_(delta)
        dq[b, i] = torch.einsum("bhij,bjhd->bihd", ds, k[b].to(wide)).mul_(scale)
        dk[b] += torch.einsum("bhij,bihd->bjhd", ds, q[b, i].to(wide)).mul_(scale)
        if dbias is not None and dbias.shape[0] == 1:
            dbias[:, :, i] += ds.sum(0, keepdim=True)
        elif dbias is not None:
            dbias[b, :, i] = ds
    if bias is not None and dbias is not None:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _parts(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the queries that cover the map in bounded parts."""
    batch, queries, heads, _ = q.shape
    rows = max(1, MAP_ELEMENTS // max(1, heads * k.shape[1]))
    samples = max(1, rows // max(1, queries))
    for b in range(0, batch, samples):
        for i in range(0, queries, rows):
            yield slice(b, min(b + samples, batch)), slice(i, min(i + rows, queries))


def _scores(
    q: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    b: slice,
    i: slice,
) -> torch.Tensor:
    """Scores of one part, (b, H, i, Sk), -inf where a key is not allowed."""
    wide = accumulated_in(q.dtype)
    keys = k.shape[1]
    scores = torch.einsum("bihd,bjhd->bhij", q[b, i].to(wide), k[b].to(wide)).mul_(scale)
    if bias is not None:
        scores = scores + bias.expand(q.shape[0], -1, q.shape[1], -1)[b, :, i]
    if causal:
        query = torch.arange(i.start, i.stop, device=q.device).unsqueeze(-1)
        future = torch.arange(keys, device=q.device) > query + (keys - q.shape[1])
        scores = scores.masked_fill(future, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[b, None, None, :], -torch.inf)
    return scores


def _dropped(q: torch.Tensor, k: torch.Tensor, p: float, seed: torch.Tensor, b: slice, i: slice) -> torch.Tensor:
    """1/(1-p) where a probability is kept, 0 where it is dropped."""
    _, queries, heads, _ = q.shape
    sample, head, query = torch.meshgrid(
        torch.arange(b.start, b.stop, device=q.device),
        torch.arange(heads, device=q.device),
        torch.arange(i.start, i.stop, device=q.device),
        indexing="ij",
    )
    keep = keep_mask(p, seed, (sample * heads + head) * queries + query, k.shape[1])
    return keep.to(accumulated_in(q.dtype)).mul_(1 / (1 - p))
