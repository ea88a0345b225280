"""A copy of a model whose large weights are stored in fewer bits; the model itself is left as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..ops.frozen_linear import FrozenWeight
from .linear import FrozenEmbedding, FrozenLinear
from .parts import BlockParts, Part, submodule
from .stack import Stack

_SMALL_TABLE = 1 << 16  # numbers of an embedding that are not worth storing in fewer bits


def prepared_copy(model: Any, stacks: dict[str, Stack], precision: str, smooth: dict[int, torch.Tensor]) -> Any:
    """The model with the linear layers of its blocks and its embedding tables stored in `precision`.

    Every other weight is shared with the model. Query, key and value of a block lie side by side, so that one product
    gives all three. smooth: what the inputs of a linear layer are multiplied by, by the layer's id.
    The embedding of a model with a language-model head stays as it is: the head is trained through.
    """
    found: dict[int, nn.Module] = {}
    for stack in stacks.values():
        for block in stack.blocks:
            found |= _stored_linears(block, stack.parts, precision, smooth)
    if not _has_head(model):
        inside = {id(module) for stack in stacks.values() for module in stack.blocks.modules()}
        for module in model.modules():
            if type(module) is nn.Embedding and id(module) not in inside and module.weight.numel() > _SMALL_TABLE:
                found[id(module)] = FrozenEmbedding(module, "bf16" if precision == "bf16" else "int8")
    return _copy(model, found)


def weight_errors(plain: Stack, prepared: Stack) -> list[float]:
    """For each block ||W - stored|| / ||W|| over its linear layers."""
    errors = []
    for block, stored in zip(plain.blocks, prepared.blocks, strict=True):
        names = {id(module): name for name, module in block.named_modules()}
        squares = torch.zeros(2)
        for linear in linears_of(block):
            weight = Part(linear).weight
            squares[0] += (weight - submodule(stored, names[id(linear)]).weight).square().sum()
            squares[1] += weight.square().sum()
        errors.append(float((squares[0] / squares[1].clamp_min(1e-30)).sqrt()))
    return errors


def linears_of(block: nn.Module) -> list[nn.Module]:
    """The linear layers of a block, GPT-2's Conv1D among them."""
    return [module for module in block.modules() if type(module) is nn.Linear or type(module).__name__ == "Conv1D"]


def _stored_linears(
    block: nn.Module, parts: BlockParts | None, precision: str, smooth: dict[int, torch.Tensor]
) -> dict[int, nn.Module]:
    found: dict[int, nn.Module] = {}
    sensitive = _sensitive(block, parts, precision)
    for group in _groups(block, parts):
        pieces = [(Part(module).weight.contiguous(), Part(module).bias) for module in group]
        chosen = "int8_weight_only" if id(group[0]) in sensitive else precision
        stored = FrozenWeight.side_by_side(pieces, chosen, smooth.get(id(group[0])) if chosen == "int8" else None)
        found |= {id(module): FrozenLinear(piece) for module, piece in zip(group, stored, strict=True)}
    return found


def _sensitive(block: nn.Module, parts: BlockParts | None, precision: str) -> set[int]:
    """The linear layers, by id, whose weights are stored in int8 and multiplied in bfloat16 instead.

    "int8": the last of the feed-forward, whose inputs come from an activation: mostly near 0, with a few very large
    ones that differ from token to token. "nf4": query, key and value, a quarter of the weights, in which 4 bits cost
    most.
    """
    if parts is None:
        return set()
    attention = parts.attention
    paths = {"int8": (parts.feed_forward.down,), "nf4": (attention.query, attention.key, attention.value)}
    found = (_linear_at(block, path.partition("[")[0]) for path in paths.get(precision, ()))
    return {id(module) for module in found if module is not None}


def _groups(block: nn.Module, parts: BlockParts | None) -> list[list[nn.Module]]:
    """The linear layers of a block; those that read the same input and are computed at once together."""
    linears = linears_of(block)
    groups = []
    for paths in [] if parts is None else _read_together(parts):
        together = [module for path in paths if (module := _linear_at(block, path)) is not None]
        if len(together) == len(paths):
            groups.append(together)
    taken = {id(module) for group in groups for module in group}
    return groups + [[module] for module in linears if id(module) not in taken]


def _read_together(parts: BlockParts) -> list[tuple[str, ...]]:
    attention, feed_forward = parts.attention, parts.feed_forward
    together: list[tuple[str, ...]] = [(attention.query, attention.key, attention.value)]
    if feed_forward.gate is not None:
        together.append((feed_forward.gate, feed_forward.up))
    if parts.cross_attention is not None:
        together.append((parts.cross_attention.key, parts.cross_attention.value))
    return together


def _linear_at(block: nn.Module, paths: str) -> nn.Module | None:
    """The linear layer at one of several paths; None where the path names a slice of a layer, or nothing."""
    for path in paths.split("|"):
        try:
            module = submodule(block, path)
        except AttributeError:
            continue
        return module if module in linears_of(block) else None
    return None


def _has_head(model: Any) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None


def _copy(model: nn.Module, found: dict[int, nn.Module]) -> Any:
    """The tree of modules with some replaced; parameters and buffers of the others are shared."""
    copies: dict[int, nn.Module] = dict(found)

    def copy(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            twin = module.__class__.__new__(module.__class__)
            copies[id(module)] = twin
            twin.__dict__.update(module.__dict__)
            for name in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
                twin.__dict__[name] = module.__dict__[name].copy()
            children = module.__dict__["_modules"].items()
            twin.__dict__["_modules"] = {name: child and copy(child) for name, child in children}
        return copies[id(module)]

    return copy(model)
