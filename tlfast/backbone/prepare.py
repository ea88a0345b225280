"""A copy of a model whose large weights are stored in fewer bits; the model itself is left as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops.frozen_linear import FrozenWeight
from .families import ACTIVATIONS
from .folding import Weight, fold
from .gated import GatedFeedForward
from .linear import FrozenEmbedding, FrozenLinear
from .parts import BlockParts, linear_at, linears_of, submodule, twin
from .stack import Stack

_SMALL_TABLE = 1 << 16  # numbers of an embedding that are not worth storing in fewer bits


def prepared_copy(
    model: Any,
    stacks: dict[str, Stack],
    precision: str,
    smooth: dict[int, torch.Tensor],
    progress: Callable[[int], Any] = lambda count: None,
) -> tuple[Any, dict[str, list[float]]]:
    """The model with its blocks' linear layers and its embedding tables stored in `precision`, and what that costs.

    Other weights are shared with the model, but for norms and scales that became part of the linear layers (folding).
    Query, key and value of a block lie side by side, so that one product gives all three; gates and what they gate are
    one weight. smooth: what the inputs of a linear layer are multiplied by, by the layer's id. progress: called with
    how many more blocks are stored.
    The embedding of a model with a language-model head stays as it is: the head is trained through.
    Also returns for each block of each stack ||W - stored|| / ||W|| over its linear layers, W as it was folded.
    """
    found: dict[int, nn.Module] = {}
    errors: dict[str, list[float]] = {name: [] for name in stacks}
    for name, stack in stacks.items():
        for block in stack.blocks:
            modules, error = _prepared_block(stack, block, precision, smooth)
            found |= modules
            errors[name].append(error)
            progress(1)
    if not has_head(model):
        inside = {id(module) for stack in stacks.values() for module in stack.blocks.modules()}
        tables: dict[int, FrozenEmbedding] = {}  # by the weight's address: tied ones are stored once
        for module in model.modules():
            if type(module) is nn.Embedding and id(module) not in inside and not small_table(module.weight):
                address = module.weight.data_ptr()
                if address not in tables:
                    tables[address] = FrozenEmbedding.of(module, "bf16" if precision == "bf16" else "int8")
                found[id(module)] = tables[address]
    return _copy(model, found), errors


def _prepared_block(
    stack: Stack, block: nn.Module, precision: str, smooth: dict[int, torch.Tensor]
) -> tuple[dict[int, nn.Module], float]:
    folded, sensitive = fold(stack, block, precision, smooth), sensitive_layers(block, stack.parts, precision)
    found, gated, squares = dict(folded.modules), Gated.of(stack, block), torch.zeros(2)
    for group in groups_of(block, stack.parts):
        pieces = [folded.weights[id(module)] for module in group]
        chosen = "int8_weight_only" if id(group[0]) in sensitive else precision
        smoothing = folded.smooth.get(id(group[0])) if chosen == "int8" else None
        if gated is not None and group == gated.halves:
            stored = [_gated_weight(pieces, chosen, smoothing)]
            both = stored[0]
        else:
            stored = FrozenWeight.side_by_side(pieces, chosen, smoothing)
            found |= {id(module): FrozenLinear(piece) for module, piece in zip(group, stored, strict=True)}
        squares += _squares(pieces, stored)
    if gated is not None:
        down: Any = found[id(gated.down)]
        found[id(gated.owner)] = GatedFeedForward(gated.names, both, down, ACTIVATIONS[stack.spec.activation])
    return found, float((squares[0] / squares[1].clamp_min(1e-30)).sqrt())


@dataclass(frozen=True)
class Gated:
    """The module that computes a gated feed-forward, and its layers: gate and up, and down; names are theirs in it."""

    owner: nn.Module
    halves: list[nn.Module]
    down: nn.Module
    names: list[str]

    @classmethod
    def of(cls, stack: Stack, block: nn.Module) -> Gated | None:
        """None where there is no gate, it is half of another layer, or the product has not its activation."""
        if stack.parts is None or not stack.spec.gated or stack.spec.activation not in ACTIVATIONS:
            return None
        parts = stack.parts.feed_forward
        found = (linear_at(block, path) for path in (parts.gate, parts.up, parts.down) if path is not None)
        layers = [layer for layer in found if layer is not None]
        if len(layers) < 3:
            return None
        paths = {id(module): path for path, module in block.named_modules()}
        owner, _, _ = paths[id(layers[0])].rpartition(".")
        names = [paths[id(layer)].removeprefix(f"{owner}.") for layer in layers]
        gate, up, down = layers
        return cls(submodule(block, owner), [gate, up], down, names)


def _gated_weight(pieces: list[Weight], precision: str, smooth: torch.Tensor | None) -> FrozenWeight:
    (gate, gate_bias), (up, up_bias) = pieces
    biases = None if gate_bias is None or up_bias is None else (gate_bias, up_bias)
    return FrozenWeight.of_gated(gate, up, biases, precision, smooth)


def _squares(pieces: list[Weight], stored: list[FrozenWeight]) -> torch.Tensor:
    """Of what storing the weights changed, and of the weights."""
    weight = torch.cat([matrix for matrix, _ in pieces])
    change = weight - torch.cat([piece.value() for piece in stored])
    return torch.stack([change.square().sum(), weight.square().sum()]).cpu()


def sensitive_layers(block: nn.Module, parts: BlockParts | None, precision: str) -> set[int]:
    """The linear layers, by id, whose weights are stored in int8 and multiplied in bfloat16 instead.

    "int8": the last of the feed-forward, whose inputs come from an activation: mostly near 0, with a few very large
    ones that differ from token to token. "nf4": query, key and value, a quarter of the weights, in which 4 bits cost
    most.
    """
    if parts is None:
        return set()
    attention = parts.attention
    paths = {"int8": (parts.feed_forward.down,), "nf4": (attention.query, attention.key, attention.value)}
    found = (linear_at(block, path.partition("[")[0]) for path in paths.get(precision, ()))
    return {id(module) for module in found if module is not None}


def groups_of(block: nn.Module, parts: BlockParts | None) -> list[list[nn.Module]]:
    """The linear layers of a block; those that read the same input and are computed at once together."""
    linears = linears_of(block)
    groups = []
    for paths in [] if parts is None else _read_together(parts):
        together = [module for path in paths if (module := linear_at(block, path)) is not None]
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


def small_table(table: torch.Tensor) -> bool:
    """Whether an embedding is not worth storing in fewer bits."""
    return table.numel() <= _SMALL_TABLE


def has_head(model: Any) -> bool:
    """Whether a model has a language-model head."""
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None


def _copy(model: nn.Module, found: dict[int, nn.Module]) -> Any:
    """The tree of modules with some replaced; parameters and buffers of the others are shared."""
    copies: dict[int, nn.Module] = dict(found)

    def copy(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            copies[id(module)] = new = twin(module)
            children = module.__dict__["_modules"].items()
            new.__dict__["_modules"] = {name: child and copy(child) for name, child in children}
        return copies[id(module)]

    return copy(model)
