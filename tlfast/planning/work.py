"""Floating-point operations of a step: multiplications and additions of its matrix products."""

from __future__ import annotations

from torch import nn

from ..backbone.parts import BlockSpec, Part, linears_of
from .outline import Outline


def frozen_blocks(outline: Outline) -> int:
    """One forward of the backbone's blocks."""
    total = 0
    for stack in outline.stacks.values():
        tokens, keys = outline.tokens(stack), outline.tokens(stack) // outline.job.batch
        weights = sum(Part(linear).weight.numel() for linear in linears_of(stack.blocks[0]))
        moved = 0
        if stack.spec.cross and stack.parts is not None and stack.parts.cross_attention is not None:
            # keys and values are made of the source's tokens
            paths = stack.parts.cross_attention.key, stack.parts.cross_attention.value
            moved = sum(Part.of(stack.blocks[0], path).weight.numel() for path in paths)
            keys += outline.job.length
        of_tokens = 2 * tokens * (weights - moved) + 4 * tokens * keys * stack.spec.heads * stack.spec.head_dim
        total += len(stack.blocks) * (of_tokens + 2 * moved * outline.job.batch * outline.job.length)
    return total


def head(outline: Outline) -> int:
    """One forward of the language-model head; a classifier's is nothing beside it."""
    return 2 * outline.tokens(outline.last) * outline.vocabulary * outline.output_width


def side(network: nn.Module, spec: BlockSpec, tokens: int, keys: int) -> int:
    """One forward of a side network, rungs included, each token attending to `keys`."""
    weights = sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))
    blocks = len(network.blocks)  # type: ignore[arg-type]
    return 2 * tokens * weights + 4 * tokens * keys * spec.heads * spec.head_dim * blocks


def rungs(taps: int, tokens: int, width: int, side_width: int) -> int:
    """One pass through the projections of all taps; their weights' gradients cost as much."""
    return 2 * taps * tokens * width * side_width
