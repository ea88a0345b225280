"""The fast path's view of a block: its weights as the operations take them, and which blocks can be seen so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops import _dispatch
from ..ops._shared_weight import why_not_native
from ..ops.frozen_linear import FrozenWeight
from ..ops.frozen_linear.panels import padded
from ..ops.norm_tap import norm_tap
from ..ops.packed_blocks import BlockWeights, NormWeights, SharedWeight
from .families import ACTIVATIONS
from .gated import Half
from .linear import FrozenLinear
from .parts import AttentionParts, FeedForwardParts, Part, find_submodule, norm_weight, submodule
from .shared_weights import why_not_shared
from .stack import Stack

_OTHER_BLOCKS = {  # what BlockParts does not say of them matters here
    "deberta-v2": "its attention adds scores of queries and keys with relative positions",
    "modernbert": "its layers rotate queries and keys by two different tables",
}

Weight = FrozenWeight | SharedWeight
FP32_WIDTH = 256  # narrower blocks have little in their products to gain, and stay exact


@dataclass(frozen=True)
class Norm:
    """weight and bias (D,) in float32, or None each, and eps."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, module: Any, rms: bool) -> Norm:
        eps = getattr(module, "eps", None) or module.variance_epsilon
        weight, bias = norm_weight(module), getattr(module, "bias", None)
        # folding leaves ones and zeros behind
        kept_weight = None if weight is None or bool((weight == 1).all()) else weight.detach()
        return cls(kept_weight, None if bias is None or not bool(bias.any()) else bias.detach(), eps, rms)

    @property
    def weights(self) -> NormWeights:
        """As ops.packed_blocks takes them."""
        weight, bias = (None if part is None else part.contiguous() for part in (self.weight, self.bias))
        return NormWeights(weight, bias, self.eps)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + residual, its norm)."""
        return norm_tap(x, residual, self.weight, self.bias, self.eps, self.rms)


@dataclass(frozen=True)
class CrossAttention:
    """An attention layer whose queries read the stream, and keys and values what an encoder gave."""

    query: Weight
    key_value: Weight
    output: Weight
    norm: Norm
    widths: tuple[int, int]  # of key and value in what key_value gives


@dataclass(frozen=True)
class PackedBlock:
    """The weights of one block as the operations take them, SharedWeight where the model is as it was given.

    window: the farthest earlier or later position its attention sees, None for any. query_norm, key_norm: of each
    head's channels. attention_output_norm, feed_forward_output_norm: of what is added to the stream.
    """

    qkv: Weight
    output: Weight
    up: Weight  # gates with it
    down: Weight
    attention_norm: Norm
    feed_forward_norm: Norm
    widths: tuple[int, int, int]  # of query, key and value in what qkv gives
    window: int | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    feed_forward_output_norm: Norm | None = None
    cross: CrossAttention | None = None

    def at_once(self) -> BlockWeights | None:
        """As ops.packed_blocks takes it, None where there is more to it."""
        more = (self.query_norm, self.key_norm, self.attention_output_norm, self.feed_forward_output_norm, self.cross)
        if any(part is not None for part in more):
            return None
        norms = self.attention_norm.weights, self.feed_forward_norm.weights
        return BlockWeights(self.qkv, self.output, self.up, self.down, *norms, self.window)


def why_not(stack: Stack, model: Any) -> str | None:
    """None where a stack can take the fast path, otherwise the reason, as `describe()` says it."""
    spec, config = stack.spec, getattr(model, "config", None)
    model_type = getattr(config, "model_type", "")
    if stack.parts is None:
        return "its family is not in the table"
    if model_type in _OTHER_BLOCKS:
        return _OTHER_BLOCKS[model_type]
    if spec.activation not in ACTIVATIONS:
        return f"its activation is {spec.activation!r}"
    if getattr(config, "word_embed_proj_dim", spec.width) != spec.width:
        return "its output is projected"
    if getattr(config, "add_cross_attention", False) and not spec.cross:
        return "config.add_cross_attention is set"
    if getattr(config, "scale_attn_weights", True) is False:
        return "config.scale_attn_weights is off"
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "attn_logit_softcapping"):
        if getattr(config, name, None):
            return f"config.{name} is set"
    return None


def why_not_fp32(stack: Stack, model: Any) -> str | None:
    """The same for a model in float32 whose weights stay where they are: it runs at once or as modules."""
    spec, reason = stack.spec, why_not(stack, model)
    if reason is not None:
        return reason
    if spec.width < FP32_WIDTH:
        return f"narrower than {FP32_WIDTH}, where fp32 gives the model's own results to the last bit"
    attention, feed_forward = stack.parts.attention, stack.parts.feed_forward  # type: ignore[union-attr]
    if spec.placement not in ("post", "pre") or attention.query_norm or attention.key_norm or spec.cross:
        return "its blocks have more norms or attention than fp32 runs at once"
    if attention.output_scale or feed_forward.output_scale:
        return "its layers' outputs are scaled"
    for block in stack.blocks:
        reason = why_not_shared(block, stack)
        if reason is not None:
            return reason
    return _dispatch.MISSING.get("native") or why_not_native()


def packed_block(stack: Stack, index: int) -> PackedBlock:
    """A block of a stack that `why_not` has nothing against."""
    block, parts, spec = stack.blocks[index], stack.parts, stack.spec
    assert parts is not None
    attention, feed_forward = parts.attention, parts.feed_forward

    def norm(path: str | None, rms: bool = spec.norm == "rms") -> Norm | None:
        return None if path is None else Norm.of(find_submodule(block, path)[1], rms)

    attention_norm, feed_forward_norm = norm(attention.norm), norm(feed_forward.norm)
    assert attention_norm is not None
    assert feed_forward_norm is not None
    qkv, widths = _joined(block, attention.query, attention.key, attention.value)
    return PackedBlock(
        qkv,
        _stored(block, attention.output),
        _up(block, feed_forward, spec.gated),
        _stored(block, feed_forward.down),
        attention_norm,
        feed_forward_norm,
        widths,
        stack.windows[index],
        norm(attention.query_norm),
        norm(attention.key_norm),
        norm(attention.output_norm),
        norm(feed_forward.output_norm),
        None if parts.cross_attention is None else _cross_attention(block, parts.cross_attention, spec.norm == "rms"),
    )


def _cross_attention(block: nn.Module, parts: AttentionParts, rms: bool) -> CrossAttention:
    key_value, widths = _joined(block, parts.key, parts.value)
    norm = Norm.of(submodule(block, parts.norm), rms)
    return CrossAttention(_stored(block, parts.query), key_value, _stored(block, parts.output), norm, widths)


def _up(block: nn.Module, parts: FeedForwardParts, gated: bool) -> Weight:
    if not gated:
        return _stored(block, parts.up)
    assert parts.gate is not None
    up, gate = Part.of(block, parts.up), Part.of(block, parts.gate)
    if isinstance(up.module, Half):
        return up.module.both.stored
    return SharedWeight.of([gate.weight, up.weight], [gate.bias, up.bias], gated=True)


def _stored(block: nn.Module, path: str) -> Weight:
    part = Part.of(block, path)
    if isinstance(part.module, FrozenLinear):
        return part.module.stored
    return SharedWeight.of([part.weight], [part.bias])


def _joined(block: nn.Module, *paths: str) -> tuple[Weight, Any]:
    """One weight for several parts that read the same input, and the width of each in what it gives."""
    parts = [Part.of(block, path) for path in paths]
    if parts[0].count > 1:  # one layer already
        stored = _stored(block, paths[0].partition("[")[0])
        return stored, (stored.outputs // parts[0].count,) * len(parts)
    widths = tuple(padded(len(part.weight)) for part in parts)
    if not isinstance(parts[0].module, FrozenLinear):
        return SharedWeight.of([part.weight for part in parts], [part.bias for part in parts]), widths
    joined = FrozenWeight.joined([part.module.stored for part in parts])  # type: ignore[union-attr, misc]
    assert joined is not None  # prepared_copy stored them so
    return joined, widths
