"""The two reductions in plain PyTorch, a bounded part of the map at a time, recomputed in the backward: any device."""

from __future__ import annotations

import torch

from .tiles import Gradients, gradients, parts

# Scores that exist at once (16 MiB in float32); one row where that is more.
MAP_ELEMENTS = 2**22


def softmax_forward(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, v = _widened(u, v)
    rows, own = (torch.empty(u.shape[0], dtype=u.dtype, device=u.device) for _ in range(2))
    columns = torch.full((v.shape[0],), -torch.inf, dtype=u.dtype, device=u.device)
    for i in parts(u.shape[0], _tile_rows(v)):
        scores, own[i] = _scores(u[i], v, scale, i.start + offset)
        rows[i] = scores.logsumexp(1)
        columns = torch.logaddexp(columns, scores.logsumexp(0))
    return rows, columns, own


def softmax_backward(
    drows: torch.Tensor,
    dcolumns: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
) -> Gradients:
    u, v = _widened(u, v)

    def weights(i: slice, _: slice) -> torch.Tensor:
        scores, _own = _scores(u[i], v, scale, i.start + offset)
        w = (scores - rows[i, None]).exp_().mul_(drows[i, None])
        w += scores.sub_(columns).exp_().mul_(dcolumns)
        w.diagonal(i.start + offset)[: w.shape[0]].copy_(down[i])
        return w

    return gradients(u, v, scale, (_tile_rows(v), max(1, v.shape[0])), need_du, need_dv, weights)


def sigmoid_forward(
    u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, v = _widened(u, v)
    rows, slopes, own = (torch.empty(u.shape[0], dtype=u.dtype, device=u.device) for _ in range(3))
    for i in parts(u.shape[0], _tile_rows(v)):
        scores, own[i] = _scores(u[i], v, scale, i.start + offset)
        scores += bias
        rows[i] = torch.logaddexp(scores.new_zeros(()), scores).sum(1)
        slopes[i] = scores.sigmoid_().sum(1)
    return rows, slopes, own


def sigmoid_backward(
    drows: torch.Tensor,
    down: torch.Tensor,
    u: torch.Tensor,
    v: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    offset: int,
    need_du: bool,
    need_dv: bool,
) -> Gradients:
    u, v = _widened(u, v)

    def weights(i: slice, _: slice) -> torch.Tensor:
        scores, _own = _scores(u[i], v, scale, i.start + offset)
        w = scores.add_(bias).sigmoid_().mul_(drows[i, None])
        w.diagonal(i.start + offset)[: w.shape[0]].copy_(down[i])
        return w

    return gradients(u, v, scale, (_tile_rows(v), max(1, v.shape[0])), need_du, need_dv, weights)


def _tile_rows(v: torch.Tensor) -> int:
    return max(1, MAP_ELEMENTS // max(1, v.shape[0]))


def _widened(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the dtype of sums: products of halves would be rounded to halves."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return u.to(wide), v.to(wide)


def _scores(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor, diagonal: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of some rows with -inf in place of own pairs, and those."""
    scores = (u @ v.T).mul_(scale)
    own = scores.diagonal(diagonal)[: u.shape[0]].clone()
    scores.diagonal(diagonal)[: u.shape[0]].fill_(-torch.inf)
    return scores, own
