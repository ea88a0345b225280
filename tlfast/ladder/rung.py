"""Where a backbone's states enter the side network: the rung of a tap, and the entrance of the embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import rung, rung_gradients


class Rung(nn.Module):
    """z = mu * s + (1 - mu) * (W h + b), mu = sigmoid(alpha / temperature), alpha = 0 at the start (mu = 0.5).

    tap_width D, width R. gate: "scalar" (one alpha) or "channel" (one a side channel). tap_dim k: W reads P h instead,
    with a fixed orthonormal basis P (k, D), a buffer; the first k channels until it is set.
    forward(h, s): h (..., D) from the frozen backbone, which gets no gradient; s (..., R). Returns z (..., R).
    Source: Sung et al. 2022 (arXiv 2206.06522), section 3.2; projections start at N(0, 0.01) as in its code.
    """

    basis: torch.Tensor | None

    def __init__(
        self, tap_width: int, width: int, temperature: float = 0.1, gate: str = "scalar", tap_dim: int | None = None
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(width, tap_dim or tap_width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.alpha = nn.Parameter(torch.zeros(width if gate == "channel" else ()))
        self.register_buffer("basis", _first_channels(tap_dim, tap_width))
        nn.init.normal_(self.weight, std=0.01)

    def project(self, h: torch.Tensor) -> torch.Tensor:
        """What the weight reads of a tap: P h (..., k), or the tap itself."""
        return _projected(h, self.basis)

    def forward(self, h: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        arguments = (self.project(h), s, self.weight, self.bias, self.alpha, self.temperature)
        if self.basis is None or not torch.is_grad_enabled():
            return rung(*arguments)
        return _WithoutState.apply(*arguments)

    def extra_repr(self) -> str:
        """One line for print()."""
        through = "" if self.basis is None else f", tap_dim={self.weight.shape[1]}"
        tap_width = (self.weight if self.basis is None else self.basis).shape[1]
        return f"tap_width={tap_width}, width={self.weight.shape[0]}, temperature={self.temperature}{through}"


class Entrance(nn.Linear):
    """s = W e + b of the backbone's embedding e (..., D), which gets no gradient. Returns (..., R).

    tap_dim k: W reads P e, as in a rung. The product is computed in the embedding's dtype.
    """

    basis: torch.Tensor | None

    def __init__(self, tap_width: int, width: int, tap_dim: int | None = None) -> None:
        super().__init__(tap_dim or tap_width, width)
        self.register_buffer("basis", _first_channels(tap_dim, tap_width))
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    def project(self, h: torch.Tensor) -> torch.Tensor:
        """As `Rung.project`."""
        return _projected(h, self.basis)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.project(h)
        if h.dtype == self.weight.dtype or torch.is_autocast_enabled(h.device.type):
            return super().forward(h)
        return F.linear(h, self.weight.to(h.dtype)).to(self.weight.dtype) + self.bias


def _first_channels(tap_dim: int | None, tap_width: int) -> torch.Tensor | None:
    """The basis that nobody has set yet."""
    if tap_dim is None:
        return None
    if tap_dim > tap_width:
        raise ValueError(f"tap_dim: {tap_dim} is more than the {tap_width} channels of a tap; pass at most {tap_width}")
    return torch.eye(tap_dim, tap_width)


def _projected(h: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    if basis is None:
        return h
    with torch.no_grad():
        return F.linear(h, basis.to(h.dtype))


class _WithoutState(torch.autograd.Function):
    """A rung that keeps the projected tap and z, but not s: beside a narrow tap that would be the larger part."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        s: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        alpha: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        z = rung(y, s, weight, bias, alpha, temperature)
        ctx.save_for_backward(y, z, weight, bias, alpha)
        ctx.temperature = temperature
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y, z, weight, bias, alpha = ctx.saved_tensors
        # narrow as they are, the products can be exact
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        grads = rung_gradients(y, dz, dotted(dz, z), weight, bias, alpha, ctx.temperature)
        wanted = zip(ctx.needs_input_grad[2:5], grads, (weight, bias, alpha), strict=True)
        own = [grad.to(like.dtype) if needed and grad is not None else None for needed, grad, like in wanted]
        return None, through_gate(dz, alpha, ctx.temperature), *own, None


def dotted(dz: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(R,): the sum of dz * z over all tokens, in float32 at least."""
    product = dz.to(torch.promote_types(dz.dtype, torch.float32)) * z
    return product.flatten(0, -2).sum(0)


def through_gate(dz: torch.Tensor, alpha: torch.Tensor, temperature: float) -> torch.Tensor:
    """What s gets of the gradient of z."""
    return dz * torch.sigmoid(alpha / temperature).to(dz.dtype)
