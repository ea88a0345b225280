"""The two reductions in plain PyTorch, a bounded part of the map at a time, recomputed in the backward: any device."""

from __future__ import annotations

from dataclasses import replace

import torch

from .tiles import Gradients, Pairs, Reduced, Wanted, gradients, parts

# Scores that exist at once (16 MiB in float32); one row where that is more.
MAP_ELEMENTS = 2**22


def softmax_forward(pairs: Pairs) -> Reduced:
    pairs = _widened(pairs)
    rows, own = (torch.empty(len(pairs.u), dtype=pairs.u.dtype, device=pairs.u.device) for _ in range(2))
    columns = torch.full((len(pairs.v),), -torch.inf, dtype=pairs.u.dtype, device=pairs.u.device)
    for i in parts(len(pairs.u), _tile_rows(pairs.v)):
        scores, own[i] = _scores(pairs, i)
        rows[i] = scores.logsumexp(1)
        columns = torch.logaddexp(columns, scores.logsumexp(0))
    return rows, columns, own


def softmax_backward(
    pairs: Pairs, wanted: Wanted, dcolumns: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> Gradients:
    pairs = _widened(pairs)

    def weights(i: slice, _: slice) -> torch.Tensor:
        scores, _own = _scores(pairs, i)
        w = (scores - rows[i, None]).exp_().mul_(wanted.drows[i, None])
        w += scores.sub_(columns).exp_().mul_(dcolumns)
        w.diagonal(i.start + pairs.offset)[: w.shape[0]].copy_(wanted.down[i])
        return w

    return gradients(pairs, wanted, (_tile_rows(pairs.v), max(1, len(pairs.v))), weights)


def sigmoid_forward(pairs: Pairs, bias: torch.Tensor) -> Reduced:
    pairs = _widened(pairs)
    rows, slopes, own = (torch.empty(len(pairs.u), dtype=pairs.u.dtype, device=pairs.u.device) for _ in range(3))
    for i in parts(len(pairs.u), _tile_rows(pairs.v)):
        scores, own[i] = _scores(pairs, i)
        scores += bias
        rows[i] = torch.logaddexp(scores.new_zeros(()), scores).sum(1)
        slopes[i] = scores.sigmoid_().sum(1)
    return rows, slopes, own


def sigmoid_backward(pairs: Pairs, bias: torch.Tensor, wanted: Wanted) -> Gradients:
    pairs = _widened(pairs)

    def weights(i: slice, _: slice) -> torch.Tensor:
        scores, _own = _scores(pairs, i)
        w = scores.add_(bias).sigmoid_().mul_(wanted.drows[i, None])
        w.diagonal(i.start + pairs.offset)[: w.shape[0]].copy_(wanted.down[i])
        return w

    return gradients(pairs, wanted, (_tile_rows(pairs.v), max(1, len(pairs.v))), weights)


def _tile_rows(v: torch.Tensor) -> int:
    return max(1, MAP_ELEMENTS // max(1, v.shape[0]))


def _widened(pairs: Pairs) -> Pairs:
    """In the dtype of sums: products of halves would be rounded to halves."""
    wide = torch.promote_types(pairs.u.dtype, torch.float32)
    return replace(pairs, u=pairs.u.to(wide), v=pairs.v.to(wide))


def _scores(pairs: Pairs, i: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of rows i with -inf in place of own pairs, and those."""
    scores = (pairs.u[i] @ pairs.v.T).mul_(pairs.scale)
    diagonal = i.start + pairs.offset
    own = scores.diagonal(diagonal)[: len(scores)].clone()
    scores.diagonal(diagonal)[: len(scores)].fill_(-torch.inf)
    return scores, own
