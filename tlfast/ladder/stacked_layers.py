"""Layers of K ladders at once: weights with a leading dimension K, and a norm's factor and offset folded into them.

A norm's affine part commutes with what follows it, so it is multiplied into the next weights once, in float64, and the
norm itself has none. Everything here holds copies of weights and builds no graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .attention import SideAttention


class Affine(NamedTuple):
    """x * scale + shift for each ladder, (K, 1, R) both, in float64 on the host; shift is None where there is none."""

    scale: torch.Tensor
    shift: torch.Tensor | None

    @classmethod
    def of(cls, norms: Sequence[Any]) -> Affine:
        """The affine parts of one norm of each ladder."""
        bias = getattr(norms[0], "bias", None)
        return cls(exact([n.weight for n in norms])[:, None], None if bias is None else exact_rows(norms))


class StackedLinear:
    """y_k = W_k x_k + b_k for each ladder k. Called with (K, T, R) or (K B, S, R); returns it with N channels.

    weight (K, R, N); bias (K, 1, N) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, linears: Sequence[Any], before: Affine | None = None) -> StackedLinear:
        """linears: one of each ladder; before: the affine part of the norm whose output they read."""
        weight = exact([linear.weight for linear in linears]).mT
        bias = None if linears[0].bias is None else exact_rows(linears)
        if before is not None:
            if before.shift is not None:
                shift = before.shift @ weight
                bias = shift if bias is None else bias + shift
            weight = before.scale.mT * weight
        like = linears[0].weight
        return cls(rounded(weight, like), None if bias is None else rounded(bias, like))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ladders, width, outputs = self.weight.shape
        rows = x.reshape(ladders, x.numel() // (ladders * width), width)
        y = torch.bmm(rows, self.weight) if self.bias is None else torch.baddbmm(self.bias, rows, self.weight)
        return y.view(*x.shape[:-1], outputs)

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """stream + y, written over stream (K, T, N)."""
        if self.bias is not None:
            stream.add_(self.bias)
        return stream.baddbmm_(x.view(*stream.shape[:2], x.shape[-1]), self.weight)


class StackedHeadNorm:
    """RMSNorm of every head's queries or keys. Called with (K B, S, H, head_dim)."""

    def __init__(self, norms: Sequence[Any]) -> None:
        self.eps = norms[0].eps
        self.weight = torch.stack([norm.weight.detach() for norm in norms])[:, None]  # (K, 1, head_dim)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ladders, _, width = self.weight.shape
        y = F.rms_norm(x, (width,), eps=self.eps)
        return (y.reshape(ladders, x.numel() // (ladders * width), width) * self.weight).view(x.shape)


def stacked_attention(attentions: Sequence[SideAttention], before: Affine | None) -> Any:
    """A SideAttention for inputs (K B, S, R); returns what its output projection, left to the caller, would read."""
    stacked = copy.deepcopy(attentions[0]).eval()
    layers: dict[str, Any] = {"qkv": StackedLinear.of([attention.qkv for attention in attentions], before)}
    for name in ("query_norm", "key_norm"):
        if getattr(stacked, name) is not None:
            layers[name] = StackedHeadNorm([getattr(attention, name) for attention in attentions])
    layers["output"] = nn.Identity()
    for name, layer in layers.items():
        delattr(stacked, name)  # a module's child may not become anything else
        setattr(stacked, name, layer)
    return stacked


class StackedFeedForward:
    """down(act(up x)), or down(act(gate x) * up x), of each ladder, on (K, T, R)."""

    def __init__(self, feed_forwards: Sequence[Any], before: Affine) -> None:
        self.activation = feed_forwards[0].activation
        gated = feed_forwards[0].gate is not None
        self.up = StackedLinear.of([module.up for module in feed_forwards], before)
        self.gate = StackedLinear.of([module.gate for module in feed_forwards], before) if gated else None
        self.down = StackedLinear.of([module.down for module in feed_forwards])

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """stream + the result, written over stream (K, T, R)."""
        hidden = self.up(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        return self.down.add_to(stream, hidden)


def normed(x: torch.Tensor, norm: str, eps: float) -> torch.Tensor:
    """x over its last dimension's deviation ("layer") or root mean square ("rms"), without an affine part."""
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def exact(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacked copies in float64, on the host: not every device has float64."""
    return torch.stack([tensor.detach().to("cpu", torch.float64) for tensor in tensors])


def exact_rows(modules: Sequence[Any]) -> torch.Tensor:
    """The modules' biases, (K, 1, N)."""
    return exact([module.bias for module in modules])[:, None]


def rounded(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x in the dtype and on the device of a ladder's own weight, dense."""
    return x.to(like.device, like.dtype).contiguous()
