"""How tlfast reads a transformer block: where its pieces are, and what shape they have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn

_PATH = re.compile(r"(?P<path>[\w.]+)(?:\[(?P<index>\d+)/(?P<count>\d+)\])?")


@dataclass(frozen=True)
class AttentionParts:
    """Paths of one attention layer inside a block; "c_attn[1/3]" is the second third of that layer's outputs."""

    query: str
    key: str
    value: str
    output: str
    norm: str
    query_norm: str | None = None
    key_norm: str | None = None
    output_norm: str | None = None
    output_scale: str | None = None


@dataclass(frozen=True)
class FeedForwardParts:
    """Paths of the feed-forward inside a block: down(act(up x)), or down(act(gate x) * up x) where there is a gate."""

    up: str
    down: str
    norm: str
    gate: str | None = None
    output_norm: str | None = None
    output_scale: str | None = None


@dataclass(frozen=True)
class BlockParts:
    """Where a transformer block keeps its pieces, as dotted paths inside the block."""

    attention: AttentionParts
    feed_forward: FeedForwardParts
    cross_attention: AttentionParts | None = None


@dataclass(frozen=True)
class BlockSpec:
    """The shape of a transformer block: everything a block of the same type but another width needs.

    width D, heads H (kv_heads of them for keys and values) of head_dim channels; hidden is the width of the
    feed-forward. norm: "layer" or "rms". placement of the norms: "post" (after the residual sum), "pre" (before each
    layer) or "sandwich" (before and after each layer). gated: down(act(gate x) * up x). bias, qkv_bias: whether the
    linear layers have one. positions: "none" (the taps carry them), "rotary" or "relative" (T5's bias, in buckets).
    scale: of the attention scores, None for head_dim ** -0.5.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    activation: str = "gelu"
    eps: float = 1e-5
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    norm: str = "layer"
    placement: str = "post"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    causal: bool = False
    cross: bool = False
    positions: str = "none"
    scale: float | None = None
    buckets: int = 32
    max_distance: int = 128


def submodule(module: nn.Module, path: str) -> Any:
    """The module at a dotted path; of the type that the table promises there."""
    return reduce(getattr, path.split("."), module)


def find_submodule(module: nn.Module, paths: str) -> tuple[str, Any]:
    """The first of several paths, separated by "|", that leads to a module: transformers renames some."""
    for path in paths.split("|"):
        try:
            return path, submodule(module, path)
        except AttributeError:
            continue
    raise AttributeError(f"{type(module).__name__} has none of {paths.replace('|', ', ')}")


def is_linear(module: nn.Module) -> bool:
    """Whether this is a plain linear layer, GPT-2's Conv1D among them; a class derived from one may compute more."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def linears_of(block: nn.Module) -> list[nn.Module]:
    """The linear layers of a block."""
    return [module for module in block.modules() if is_linear(module)]


def linear_at(block: nn.Module, paths: str) -> nn.Module | None:
    """The linear layer at one of several paths; None where the path names a slice of a layer, or nothing."""
    for path in paths.split("|"):
        try:
            module = submodule(block, path)
        except AttributeError:
            continue
        return module if module in linears_of(block) else None
    return None


def twin(module: nn.Module) -> nn.Module:
    """A module of the same class that shares what another has, and can be given other children and parameters."""
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        copy.__dict__[name] = module.__dict__[name].copy()
    return copy


@dataclass(frozen=True)
class Part:
    """A linear layer of a block, or one of `count` equal slices of its outputs."""

    module: nn.Module
    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, block: nn.Module, path: str) -> Part:
        """The part at a path as `AttentionParts` writes it."""
        for alternative in path.split("|"):
            found = _PATH.fullmatch(alternative)
            assert found is not None, path
            try:
                module = submodule(block, found["path"])
            except AttributeError:
                continue
            return cls(module, int(found["index"] or 0), int(found["count"] or 1))
        raise AttributeError(f"{type(block).__name__} has none of {path.replace('|', ', ')}")

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs): GPT-2's Conv1D keeps it the other way round."""
        weight: Any = self.module.weight
        return (weight.T if type(self.module).__name__ == "Conv1D" else weight).chunk(self.count)[self.index]

    @property
    def bias(self) -> torch.Tensor | None:
        """(outputs,), or None."""
        bias: Any = self.module.bias
        return None if bias is None else bias.chunk(self.count)[self.index]

    def take(self, output: torch.Tensor) -> torch.Tensor:
        """This part's share of the layer's output, (..., outputs)."""
        return output.chunk(self.count, dim=-1)[self.index]


def norm_weight(norm: nn.Module) -> torch.Tensor | None:
    """The factor of a norm; None for one without (nn.Identity). Gemma keeps it as an offset from 1."""
    weight: Any = getattr(norm, "weight", None)
    if weight is None:
        return None
    return 1 + weight if type(norm).__name__.startswith("Gemma") else weight
