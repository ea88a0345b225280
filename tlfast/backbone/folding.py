"""What a block's fixed factors become once nothing is trained: part of the weights beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .parts import BlockParts, Part, find_submodule, linear_at, linears_of, norm_weight, submodule, twin
from .stack import Stack

Weight = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Folded:
    """A block's linear layers as they are stored, and the modules that change with them; both by the module's id.

    smooth: what a linear layer's inputs still have to be multiplied by.
    """

    weights: dict[int, Weight]
    modules: dict[int, nn.Module]
    smooth: dict[int, torch.Tensor]


def fold(stack: Stack, block: nn.Module, precision: str, smooth: dict[int, torch.Tensor]) -> Folded:
    """Move norms' factors and offsets, layer scales and what smooths int8's inputs to where they cost nothing.

    A norm gives n * w + b, with n of mean square 1. Where only linear layers read it (norms before the layers), they
    get W f and c + W b for W and c, and it gives n * (w / f), with f
        "bf16", "fp8": w. The norm has no factor left, and rounding errors are relative: they stay what they were.
        "int8": 1 / smooth, by which W is divided anyhow: the norm smooths its outputs, the product has nothing to do.
        "nf4": 1. W * w has columns of very different sizes in a group of 64, and 4 bits would lose the small ones.
    A scale of what a layer adds to the stream is a factor of its weight's rows, each of which has its own scale.
    The scale of attention's scores stays: the kernel multiplies float32 sums by it in the instruction that subtracts
    their maximum.
    """
    weights = {id(linear): _weight(linear) for linear in linears_of(block)}
    folded = Folded(weights, {}, dict(smooth))
    if stack.parts is not None:
        _fold_scales(block, stack.parts, folded)
        if stack.spec.placement != "post":
            for path, readers in _norms(stack.parts):
                _fold_norm(find_submodule(block, path)[1], _linears(block, readers), precision, folded)
    return folded


def _weight(linear: nn.Module) -> Weight:
    part = Part(linear)
    return part.weight.detach(), None if part.bias is None else part.bias.detach()


def _norms(parts: BlockParts) -> list[tuple[str, tuple[str | None, ...]]]:
    """Each norm before a layer, and the paths of the linear layers that read it."""
    attention, cross, feed_forward = parts.attention, parts.cross_attention, parts.feed_forward
    found: list[tuple[str, tuple[str | None, ...]]] = [
        (attention.norm, (attention.query, attention.key, attention.value)),
        (feed_forward.norm, (feed_forward.gate, feed_forward.up)),
    ]
    return found if cross is None else [*found, (cross.norm, (cross.query,))]


def _linears(block: nn.Module, paths: tuple[str | None, ...]) -> list[nn.Module]:
    """Slices of one layer are that layer, once; a path that leads nowhere is T5 1.0's gate."""
    found = (linear_at(block, path.partition("[")[0]) for path in paths if path is not None)
    return list({id(linear): linear for linear in found if linear is not None}.values())


def _fold_norm(norm: Any, linears: list[nn.Module], precision: str, folded: Folded) -> None:
    weight, bias = norm_weight(norm), getattr(norm, "bias", None)
    if weight is None or (bias is not None and any(folded.weights[id(linear)][1] is None for linear in linears)):
        return  # nn.Identity, or an offset that no layer can take
    factor = _factor(weight, precision, folded.smooth.get(id(linears[0])))
    for linear in linears:
        matrix, offset = folded.weights[id(linear)]
        if bias is not None and offset is not None:
            offset = (offset.double() + matrix.double() @ bias.double()).to(offset.dtype)
        folded.weights[id(linear)] = (matrix if factor is None else matrix * factor), offset
        folded.smooth.pop(id(linear), None)
    own = torch.ones_like(weight) if factor is weight else weight if factor is None else weight / factor
    folded.modules[id(norm)] = _norm_with(norm, own, bias)


def _factor(weight: torch.Tensor, precision: str, smooth: torch.Tensor | None) -> torch.Tensor | None:
    if precision in ("bf16", "fp8"):
        return weight
    return None if smooth is None else 1 / smooth


def _norm_with(norm: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """The same norm with another factor, and without offset where it had one."""
    copy: Any = twin(norm)
    is_offset_from_one = norm.weight is not norm_weight(norm)
    copy.weight = nn.Parameter((weight - 1 if is_offset_from_one else weight).detach(), requires_grad=False)
    if bias is not None:
        copy.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
    return copy


def _fold_scales(block: nn.Module, parts: BlockParts, folded: Folded) -> None:
    pairs = ((parts.attention.output, parts.attention), (parts.feed_forward.down, parts.feed_forward))
    for path, layer in pairs:
        linear = linear_at(block, path)
        if layer.output_scale is None or linear is None:
            continue
        owner_path, _, name = layer.output_scale.rpartition(".")
        owner = submodule(block, owner_path)
        scale = getattr(owner, name).detach()
        matrix, offset = folded.weights[id(linear)]
        folded.weights[id(linear)] = matrix * scale[:, None], None if offset is None else offset * scale
        copy = twin(owner)
        setattr(copy, name, nn.Parameter(torch.ones_like(scale), requires_grad=False))
        folded.modules[id(owner)] = copy
