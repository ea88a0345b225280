"""The map of scores a bounded part at a time: what the implementations that never hold it share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

Reduced = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]


def parts(size: int, step: int) -> Iterator[slice]:
    """Slices that cover range(size)."""
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


@dataclass(frozen=True)
class Pairs:
    """What scores are made of: s_ij = scale u_i . v_j; row i and column i + offset belong together."""

    u: torch.Tensor
    v: torch.Tensor
    scale: torch.Tensor
    offset: int


@dataclass(frozen=True)
class Wanted:
    """What a backward starts from, the gradients by rows and own scores, and which gradients it is to find."""

    drows: torch.Tensor
    down: torch.Tensor
    need_du: bool
    need_dv: bool


def gradients(
    pairs: Pairs, wanted: Wanted, tile: tuple[int, int], weights: Callable[[slice, slice], torch.Tensor]
) -> Gradients:
    """scale W v, scale W^T u and sum(W * (u v^T)) for the map W of d loss / d score, made and used tile by tile.

    `weights(i, j)` makes W's rows i and columns j in the dtype of u and v, which it may overwrite the next time. Sums
    are in float32 (float64 for float64). One of need_du and need_dv must be set: the last result comes from it.
    """
    u, v = pairs.u, pairs.v
    wide = torch.promote_types(u.dtype, torch.float32)
    du = torch.zeros(u.shape, dtype=wide, device=u.device) if wanted.need_du else None
    dv = torch.zeros(v.shape, dtype=wide, device=v.device) if wanted.need_dv else None
    for i in parts(u.shape[0], tile[0]):
        for j in parts(v.shape[0], tile[1]):
            w = weights(i, j)
            if du is not None:
                _add_product(du[i], w, v[j])
            if dv is not None:
                _add_product(dv[j], w.T, u[i])
    inputs, found = (u, du) if du is not None else (v, dv)
    assert found is not None
    dscale = torch.zeros((), dtype=torch.float64, device=u.device)
    for i in parts(inputs.shape[0], tile[0]):
        dscale += torch.linalg.vecdot(inputs[i].to(wide), found[i]).sum(dtype=torch.float64)
    for gradient in (du, dv):
        if gradient is not None:
            gradient *= pairs.scale
    return du, dv, dscale


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
