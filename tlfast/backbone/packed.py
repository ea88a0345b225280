"""The fast path: a stack's blocks over packed tokens, three operations instead of transformers' modules.

Which blocks take it is decided once, by `why_not`; all others run as the model has them.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.frozen_linear import ACTIVATE, FrozenWeight, frozen_linear
from ..ops.frozen_linear.panels import padded
from ..ops.norm_tap import norm_tap
from ..ops.packed_attention import packed_attention
from .linear import FrozenLinear
from .parts import Part, find_submodule, norm_weight, submodule
from .stack import Stack

# transformers' names of activations, as ops.frozen_linear calls them
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_OTHER_BLOCKS = ("deberta-v2", "modernbert", "dinov2")  # what BlockParts does not say of them matters here
_MASK_SETS_POSITIONS = ("opt",)
_NORM_IS_THE_POOLERS = ("clip_vision_model",)  # the last hidden state is that of the last block


@dataclass(frozen=True)
class Norm:
    """weight and bias (D,) in float32, or None each, and eps."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    rms: bool

    @classmethod
    def of(cls, module: Any, rms: bool) -> Norm:
        bias = getattr(module, "bias", None)
        eps = getattr(module, "eps", None) or module.variance_epsilon
        weight = norm_weight(module)
        return cls(None if weight is None else weight.detach(), None if bias is None else bias.detach(), eps, rms)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + residual, its norm)."""
        return norm_tap(x, residual, self.weight, self.bias, self.eps, self.rms)


@dataclass(frozen=True)
class PackedBlock:
    """The weights of one block as the operations take them."""

    qkv: FrozenWeight
    output: FrozenWeight
    up: FrozenWeight
    down: FrozenWeight
    attention_norm: Norm
    feed_forward_norm: Norm
    widths: tuple[int, int, int]  # of query, key and value in what qkv gives
    hidden: int


@dataclass(frozen=True)
class Sequences:
    """Which tokens are packed, and what their attention needs: see ops.packed_attention."""

    cu_seqlens: torch.Tensor
    bias: torch.Tensor | None
    rotation: tuple[torch.Tensor, torch.Tensor] | None


class PackedStack:
    """The blocks of a stack over packed tokens (T, D) in bfloat16. Holds no weights of its own."""

    def __init__(self, stack: Stack, model_type: str) -> None:
        self.spec = stack.spec
        self.blocks = [_packed_block(stack, block) for block in stack.blocks]
        norm = None if model_type in _NORM_IS_THE_POOLERS else stack.final_norm
        self.final_norm = None if norm is None else Norm.of(norm, stack.spec.norm == "rms")
        self.activation = _ACTIVATIONS[stack.spec.activation]

    def run(
        self, x: torch.Tensor, sequences: Sequences, taps: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x (T, D), what the first block reads -> the tapped blocks' outputs and the last hidden state."""
        kept, pre = {}, self.spec.placement == "pre"
        normed = self.blocks[0].attention_norm(x)[1] if pre and self.blocks else x
        for index, block in enumerate(self.blocks):
            if pre:
                after = self.blocks[index + 1].attention_norm if index + 1 < len(self.blocks) else self.final_norm
                x, normed = self._pre_norm(block, x, normed, sequences, after)
            else:
                x = self._post_norm(block, x, sequences)
                normed = x
            if index in taps:
                kept[index] = x
        return [kept[index] for index in taps], normed

    def _post_norm(self, block: PackedBlock, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        _, x = block.attention_norm(self._attend(block, x, sequences), x)
        return block.feed_forward_norm(self._feed_forward(block, x), x)[1]

    def _pre_norm(
        self, block: PackedBlock, x: torch.Tensor, normed: torch.Tensor, sequences: Sequences, after: Norm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, normed = block.feed_forward_norm(self._attend(block, normed, sequences), x)
        change = self._feed_forward(block, normed)
        if after is not None:
            return after(change, x)
        x = x + change
        return x, x

    def _attend(self, block: PackedBlock, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        spec = self.spec
        qkv = frozen_linear(x, block.qkv).split(block.widths, dim=-1)
        counts = (spec.heads, spec.kv_heads, spec.kv_heads)
        q, k, v = (
            part[:, : heads * spec.head_dim].unflatten(1, (heads, spec.head_dim))
            for part, heads in zip(qkv, counts, strict=True)
        )
        attended = packed_attention(
            q,
            k,
            v,
            sequences.cu_seqlens,
            scale=spec.scale,
            causal=spec.causal,
            bias=sequences.bias,
            rotation=sequences.rotation,
        )
        return frozen_linear(attended.flatten(1), block.output)

    def _feed_forward(self, block: PackedBlock, x: torch.Tensor) -> torch.Tensor:
        if not self.spec.gated:
            return frozen_linear(frozen_linear(x, block.up, self.activation), block.down)
        both = frozen_linear(x, block.up)
        gate, up = both.split(both.shape[1] // 2, dim=1)
        hidden = ACTIVATE[self.activation](gate[:, : block.hidden]) * up[:, : block.hidden]
        return frozen_linear(hidden, block.down)


def why_not(stack: Stack, model: Any) -> str | None:
    """None where a stack can take the fast path, otherwise the reason, as `describe()` says it."""
    spec, config = stack.spec, getattr(model, "config", None)
    model_type = getattr(config, "model_type", "")
    if stack.parts is None:
        return "its family is not in the table"
    if spec.cross:
        return "its blocks attend to an encoder"
    if spec.placement not in ("pre", "post") or spec.qk_norm:
        return "norms after its layers or of its queries and keys"
    if model_type in _OTHER_BLOCKS:
        return f"{model_type}'s blocks have more to them than the fast path runs"
    if spec.activation not in _ACTIVATIONS:
        return f"its activation is {spec.activation!r}"
    if getattr(config, "word_embed_proj_dim", spec.width) != spec.width:
        return "its output is projected"
    if "sliding_attention" in stack.layer_types or getattr(config, "sliding_window", None):
        return "its attention sees a window"
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "attn_logit_softcapping"):
        if getattr(config, name, None):
            return f"config.{name} is set"
    return None


@dataclass(frozen=True)
class Batch:
    """A padded batch of (B, S) positions: which of them are tokens, and what the blocks need to know of them.

    kept: places of the tokens in (B S), None where every position is one.
    """

    shape: tuple[int, int]
    kept: torch.Tensor | None
    sequences: Sequences

    @classmethod
    def of(cls, stack: Stack, shape: Any, mask: torch.Tensor | None, block_inputs: dict[str, Any]) -> Batch:
        """block_inputs: what the first block was given beside the hidden states."""
        examples, length = shape
        device = next(stack.blocks[0].buffers()).device
        counts = torch.full((examples,), length, device=device) if mask is None else mask.sum(1)
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        kept = None if mask is None or int(cu_seqlens[-1]) == mask.numel() else mask.flatten().nonzero().squeeze(1)
        rotation = bias = None
        if stack.spec.positions == "rotary":
            tables = (
                table.float().expand(examples, -1, -1).flatten(0, 1) for table in block_inputs["position_embeddings"]
            )
            cosines, sines = (table if kept is None else table[kept] for table in tables)
            rotation = cosines, sines
        if stack.spec.positions == "relative":
            attention = submodule(stack.blocks[0], "layer.0.SelfAttention")
            bias = attention.compute_bias(length, length, device=device)[0].float().contiguous()
        return cls((examples, length), kept, Sequences(cu_seqlens, bias, rotation))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (tokens, D)."""
        x = x.flatten(0, 1)
        return x.contiguous() if self.kept is None else x[self.kept]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, D) to (B, S, D), zeros at padding."""
        if self.kept is not None:
            examples, length = self.shape
            x = x.new_zeros(examples * length, x.shape[1]).index_copy_(0, self.kept, x)
        return x.view(*self.shape, -1)


class _Reached(Exception):
    """What the first block was given; the forward ends there."""


def reach_blocks(stack: Stack, module: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The model's own embeddings (B, S, D), and what else it passes to its first block.

    The mask is left out where no position depends on it: the model would make (B, S, S) of it, which nothing reads.
    """
    thread = threading.get_ident()

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            raise _Reached(args, kwargs)

    config = getattr(module, "config", None)
    if getattr(config, "model_type", "") not in _MASK_SETS_POSITIONS and "attention_mask" in inputs:
        whole = torch.ones_like(inputs["attention_mask"]) if stack.spec.causal else None
        inputs = inputs | {"attention_mask": whole}
    if stack.spec.causal and "use_cache" in inspect.signature(type(module).forward).parameters:
        inputs = inputs | {"use_cache": False}
    handle = stack.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        module(**inputs)
    except _Reached as reached:
        args, kwargs = reached.args
        return (args[0] if args else kwargs["hidden_states"]), kwargs
    finally:
        handle.remove()
    raise AssertionError("the model did not run its blocks")


def contiguous(mask: torch.Tensor | None) -> bool:
    """Whether no sequence has a gap: positions inside it then are differences of places."""
    if mask is None:
        return True
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    return bool((starts <= 1).all())


def _packed_block(stack: Stack, block: nn.Module) -> PackedBlock:
    parts, spec = stack.parts, stack.spec
    assert parts is not None
    attention, feed_forward, rms = parts.attention, parts.feed_forward, spec.norm == "rms"
    qkv, widths = _joined(block, attention.query, attention.key, attention.value)
    gate = [feed_forward.gate] if spec.gated and feed_forward.gate is not None else []
    up, _ = _joined(block, *gate, feed_forward.up)
    return PackedBlock(
        qkv,
        _stored(block, attention.output),
        up,
        _stored(block, feed_forward.down),
        Norm.of(find_submodule(block, attention.norm)[1], rms),
        Norm.of(find_submodule(block, feed_forward.norm)[1], rms),
        widths,
        spec.hidden,
    )


def _stored(block: nn.Module, path: str) -> FrozenWeight:
    module = Part.of(block, path).module
    assert isinstance(module, FrozenLinear)
    return module.stored


def _joined(block: nn.Module, *paths: str) -> tuple[FrozenWeight, Any]:
    """One weight for several parts that read the same input, and the width of each in what it gives."""
    parts = [Part.of(block, path) for path in paths]
    if parts[0].count > 1:  # one layer already
        stored = _stored(block, paths[0].partition("[")[0])
        return stored, (stored.outputs // parts[0].count,) * len(parts)
    pieces = [_stored(block, path) for path in paths]
    joined = FrozenWeight.joined(pieces)
    assert joined is not None  # prepared_copy stored them so
    return joined, tuple(padded(piece.outputs) for piece in pieces)
