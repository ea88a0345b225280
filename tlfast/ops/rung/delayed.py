"""The gradients of a rung's own weights without its side state: for taps that come once more, or are kept smaller."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .. import _dispatch
from .._rows import as_operand, as_rows
from .autograd import kernels

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rung_gradients(
    h: torch.Tensor,
    dz: torch.Tensor,
    dz_z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor | None,
    temperature: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What weight, bias and gate of z = rung(h, s, weight, bias, alpha) get, from h, the gradient of z, and a sum.

    d z / d alpha is (1 - mu) / T (z - p) with p = h @ weight.T + bias, which is computed once more: s is not needed.
    The sum of dz * p is also <dz.T @ h, weight> + <sum of dz, bias>, without another product; but z and p nearly
    cancel, and in 16 bits the rounding of dz.T @ h would be what is left.

    Args:
        h: tap (..., D). dz: (..., R), the gradient of z.
        dz_z: (R,), the sum of dz * z over all tokens, which can be taken long before h is at hand.
        weight, bias, alpha, temperature: as `rung` takes them; alpha None: of p alone, without a gate (mu = 0).

    Returns:
        dweight (R, D), dbias (R,), and dalpha in alpha's shape or None; in float32, of float64 taps in float64.

    Cost: 4 M D R flops for M tokens (2 without a gate), and the bytes of h and dz.

    Source: derived here from Sung et al. 2022 (arXiv 2206.06522), section 3.2.
    """
    gate = dz.new_full((), -math.inf) if alpha is None else alpha
    dweight, dbias = _products(h, dz, gate, temperature)
    if alpha is None:
        return dweight, dbias, None
    rest = torch.sigmoid(-gate.to(dweight.dtype) / temperature)
    p = F.linear(as_operand(h), weight.to(h.dtype)).to(dweight.dtype)
    dz_p = p.mul_(as_rows(dz)).sum(0)
    if bias is not None:
        dz_p += as_rows(dz).to(dweight.dtype).sum(0) * bias
    dalpha = rest * (dz_z - dz_p) / temperature
    dalpha = dalpha if alpha.numel() == dalpha.numel() else dalpha.sum()
    return dweight, dbias, dalpha.view(alpha.shape)


def _products(
    h: torch.Tensor, dz: torch.Tensor, gate: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 - mu) dz.T @ h and (1 - mu) times the sum of dz."""

    def refuses(name: str) -> str | None:
        kernel = name != "reference" and {h.dtype, dz.dtype, gate.dtype} - {*_KERNEL_DTYPES}
        return "float64" if kernel else None

    chosen = _dispatch.choose("rung", "auto", ("reference", "native", "triton", "cuda"), h.device.type, refuses)
    if chosen != "reference":
        _, dweight, dbias, _ = kernels(chosen).backward(dz, h, None, None, gate, temperature, False, True)
        return dweight, dbias
    rest, rows = torch.sigmoid(-gate / temperature), as_rows(dz)
    product = as_operand(rows.to(h.dtype)).T @ as_operand(h)
    wide = torch.promote_types(product.dtype, torch.float32)
    return product.to(wide) * rest[..., None], rows.to(wide).sum(0) * rest
