"""The weights of a model that is shared with its owner: whether they can be read where they are, and have changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .parts import Part, is_linear
from .stack import Stack


def why_not_shared(block: nn.Module, stack: Stack) -> str | None:
    """None where all weights of a block can be read as they are."""
    assert stack.parts is not None
    attention, feed_forward = stack.parts.attention, stack.parts.feed_forward
    gate = [] if feed_forward.gate is None or not stack.spec.gated else [feed_forward.gate]
    inputs_of = (attention.query, attention.key, attention.value), (*gate, feed_forward.up)
    for paths in (*inputs_of, (attention.output,), (feed_forward.down,)):
        parts = [Part.of(block, path) for path in paths]
        other = next((part.module for part in parts if not is_linear(part.module)), None)
        if other is not None:
            return f"a layer of its blocks is a {type(other).__name__}"
        if len({part.weight.stride() for part in parts}) > 1:
            return "weights that are multiplied together lie in memory in different orders"
    if any(module._forward_hooks or module._forward_pre_hooks for module in _inside(block)):
        return "hooks watch its layers"
    if not all(map(_is_readable, block.parameters())):
        return "its weights are not float32 on the CPU, whole"
    return None


def weights_state(stack: Stack) -> list[tuple[Any, ...]]:
    """What changes with the weights of the blocks, their places, and what their layers are and are watched by.

    Every forward asks for it, so the modules are walked once.
    """
    state: list[tuple[Any, ...]] = []
    for block in stack.blocks:
        state += map(_weight_state, _own_weights(block))
        for module in _inside(block):
            state.append((type(module), len(module._forward_hooks), len(module._forward_pre_hooks)))
            state += map(_weight_state, _own_weights(module))
    return state


def _inside(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block but for itself: a forward watches whole blocks for as long as it lasts."""
    return (module for child in block.children() for module in child.modules())


def _own_weights(module: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in module._parameters.values() if weight is not None]


def _is_readable(weight: torch.Tensor) -> bool:
    """Not moved, cast or sharded."""
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


def _weight_state(weight: Any) -> tuple[int, int, int]:
    address = weight.data_ptr() if _is_readable(weight) else 0
    return id(weight), address, 0 if weight.is_inference() else weight._version
