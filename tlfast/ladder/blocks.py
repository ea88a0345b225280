"""SideBlock: a transformer block of the backbone's own type, lean in what it keeps for its backward pass."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..backbone.families import BlockSpec
from ..ops import add_norm, attention

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def reduced(spec: BlockSpec, reduction: int, dropout: float | None = None) -> BlockSpec:
    """The shape of a side block: widths divided by the reduction, the number of heads kept.

    Raises ValueError, with the reductions that fit, where widths or heads do not divide.
    """

    def fits(r: int) -> bool:
        return spec.width % r == 0 and spec.hidden % r == 0 and (spec.width // r) % spec.heads == 0

    if not fits(reduction):
        allowed = [r for r in range(1, spec.width + 1) if fits(r)]
        raise ValueError(
            f"reduction: {reduction} does not divide a block of width {spec.width}, feed-forward {spec.hidden} and "
            f"{spec.heads} heads; allowed: {', '.join(map(str, allowed))}"
        )
    narrow = dataclasses.replace(spec, width=spec.width // reduction, hidden=spec.hidden // reduction)
    if dropout is None:
        return narrow
    return dataclasses.replace(narrow, hidden_dropout=dropout, attention_dropout=dropout)


class SideBlock(nn.Module):
    """A post-norm encoder block (attention, add & norm, feed-forward, add & norm) that keeps only narrow tensors.

    forward(x, key_mask): x (B, S, R), key_mask (B, S) bool, True where a token is. Returns (B, S, R).
    Kept for the backward pass, with the native kernels (CPU, float32): nine tensors of width R (x, queries, keys,
    values, the heads' output, sum and result of both add & norms) and a few numbers a row. The attention map exists in
    neither pass; the feed-forward's hidden layer, the widest part, is recomputed.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.1; Devlin et al. 2019 (arXiv 1810.04805), section 3.
    """

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        if spec.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {spec.activation!r} is not available; allowed: {', '.join(ACTIVATIONS)}")
        self.spec = spec
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.attention_output = nn.Linear(spec.width, spec.width)
        self.attention_norm = nn.LayerNorm(spec.width, eps=spec.eps)
        self.up = nn.Linear(spec.width, spec.hidden)
        self.down = nn.Linear(spec.hidden, spec.width)
        self.feed_forward_norm = nn.LayerNorm(spec.width, eps=spec.eps)
        for linear in (self.qkv, self.attention_output, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        # drawn here, so that recomputing draws nothing
        seeds = torch.randint(2**62, (3,)) if self.training else torch.zeros(3, dtype=torch.int64)
        x = self._add_norm(self._attend(x, key_mask, seeds[0]), x, self.attention_norm, seeds[1])
        # recomputing ends at the last product's input: the product itself runs once
        hidden = checkpoint(self._feed_forward, x, use_reentrant=False, preserve_rng_state=False)
        return self._add_norm(hidden, x, self.feed_forward_norm, seeds[2])

    def _attend(self, x: torch.Tensor, key_mask: torch.Tensor | None, seed: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.spec.heads, -1)).unbind(-3)
        dropout_p = self.spec.attention_dropout if self.training else 0.0
        heads = attention(q, k, v, key_mask=key_mask, dropout_p=dropout_p, seed=seed)
        return self.attention_output(heads.flatten(-2))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(ACTIVATIONS[self.spec.activation](self.up(x)))

    def _add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm, seed: torch.Tensor
    ) -> torch.Tensor:
        dropout_p = self.spec.hidden_dropout if self.training else 0.0
        return add_norm(x, residual, norm.weight, norm.bias, eps=norm.eps, dropout_p=dropout_p, seed=seed)
