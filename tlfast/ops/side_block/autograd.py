"""The kernel of a side block as PyTorch operators, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import native
from .weights import BlockSettings, BlockWeights

_SETTINGS = (
    "int heads, str placement, str norm, str activation, bool causal, float eps, float scale,"
    " float attention_dropout, float hidden_dropout, str precision"
)
torch.library.define(
    "tlfast::side_block_fwd",
    f"(Tensor x, Tensor? key_mask, Tensor? seeds, Tensor?[] weights, {_SETTINGS})"
    " -> (Tensor out, Tensor kept, Tensor statistics)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tlfast::side_block_bwd",
    "(Tensor dout, Tensor x, Tensor kept, Tensor statistics, Tensor? key_mask, Tensor? seeds, Tensor?[] weights,"
    f" {_SETTINGS}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("tlfast::side_block_fwd", "cpu")
def _forward(
    x: torch.Tensor,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return native.forward(x, BlockWeights(*weights), BlockSettings(*settings), key_mask, seeds)  # type: ignore[arg-type]


@torch.library.register_fake("tlfast::side_block_fwd")
def _forward_fake(
    x: torch.Tensor,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length, _ = x.shape
    given = BlockSettings(*settings)
    kept = x.new_empty((batch, length, native.kept_width(BlockWeights(*weights), given)))  # type: ignore[arg-type]
    return x.new_empty(x.shape), kept, x.new_empty((batch, given.heads, length, 2))


@torch.library.impl("tlfast::side_block_bwd", "cpu")
def _backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    kept: torch.Tensor,
    statistics: torch.Tensor,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    *settings: Any,
) -> list[torch.Tensor]:
    """dx and the gradients of the weights that are there."""
    given = BlockWeights(*weights)  # type: ignore[arg-type]
    dx, gradients = native.backward(dout, x, kept, statistics, given, BlockSettings(*settings), key_mask, seeds)
    return [dx, *(gradient for gradient in gradients if gradient is not None)]


@torch.library.register_fake("tlfast::side_block_bwd")
def _backward_fake(
    dout: torch.Tensor,
    x: torch.Tensor,
    kept: torch.Tensor,
    statistics: torch.Tensor,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
    weights: Sequence[torch.Tensor | None],
    *settings: Any,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape), *(weight.new_empty(weight.shape) for weight in weights if weight is not None)]


class SideBlock(torch.autograd.Function):
    """Keeps x, the heads' output, the last sum where a norm reads it, and two numbers a row of the attention map; the
    rest is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        key_mask: torch.Tensor | None,
        seeds: torch.Tensor | None,
        settings: BlockSettings,
        *weights: torch.Tensor | None,
    ) -> torch.Tensor:
        out, kept, statistics = torch.ops.tlfast.side_block_fwd.default(x, key_mask, seeds, list(weights), *settings)
        ctx.save_for_backward(x, kept, statistics, key_mask, seeds, *weights)
        ctx.settings = settings
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, kept, statistics, key_mask, seeds, *weights = ctx.saved_tensors
        dx, *gradients = torch.ops.tlfast.side_block_bwd.default(
            dout, x, kept, statistics, key_mask, seeds, weights, *ctx.settings
        )
        remaining = iter(gradients)
        return dx, None, None, None, *(None if weight is None else next(remaining) for weight in weights)
