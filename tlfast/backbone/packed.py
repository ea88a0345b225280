"""The fast path: a stack's blocks over packed tokens, three operations instead of transformers' modules.

Which blocks take it is decided once, by `packed_block.why_not`; all others run as the model has them.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ops._dispatch import runs_eagerly
from ..ops.frozen_linear import frozen_linear
from ..ops.frozen_linear.layout import PANELS
from ..ops.packed_attention import packed_attention
from ..ops.packed_blocks import Form, SharedWeight, Table, packed_blocks, pays_in_float32
from ..ops.packed_blocks import why_not as why_not_at_once
from .families import ACTIVATIONS
from .packed_block import CrossAttention, Norm, PackedBlock, Weight, packed_block
from .parts import submodule
from .sequences import Memory, Offsets, Sequences
from .stack import Stack

TOKENS = torch.bfloat16  # of prepared weights
_PIECE = 1024  # tokens; fewer would have PyTorch's library lay float32 weights out too often
# Tokens whose hidden channels, the widest there are, exist at once on a GPU; products of more are no faster.
_HIDDEN_AT_ONCE = 4096
_MASK_SETS_POSITIONS = ("opt",)
_NORM_IS_THE_POOLERS = ("clip_vision_model",)  # the last hidden state is that of the last block


class PackedStack:
    """The blocks of a stack over packed tokens (T, D). Holds no weights of its own.

    dtype: of the tokens, float32 where the weights are the model's own and bfloat16 where they are prepared.
    """

    def __init__(self, stack: Stack, model_type: str) -> None:
        self.spec = stack.spec
        self.blocks = [packed_block(stack, index) for index in range(len(stack.blocks))]
        norm = None if model_type in _NORM_IS_THE_POOLERS else stack.final_norm
        self.final_norm = None if norm is None else Norm.of(norm, stack.spec.norm == "rms")
        self.activation = ACTIVATIONS[stack.spec.activation]
        shared = any(isinstance(block.qkv, SharedWeight) for block in self.blocks)
        self.dtype = torch.float32 if shared else TOKENS
        self.table = self._at_once()
        self._tables: dict[tuple[int, ...], list[tuple[Table, tuple[int, ...]]]] = {}

    def run(
        self, x: torch.Tensor, sequences: Sequences, taps: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x (T, D), what the first block reads -> the tapped blocks' outputs and the last hidden state."""
        if self.table is not None and why_not_at_once(x, self.table, sequences.offsets.host) is None:
            places = sequences.offsets.host, taps, sequences.bias, sequences.rotation
            return packed_blocks(x, self.table, *places)
        if self._goes_in_pieces(x):
            return self._run_in_pieces(x, sequences, taps)
        return self.run_one_by_one(x, sequences, taps)

    def _goes_in_pieces(self, x: torch.Tensor) -> bool:
        """Whether some _PIECE tokens at a time are faster than all."""
        return self.dtype == torch.float32 and x.device.type == "cpu" and runs_eagerly(x)

    def _run_in_pieces(
        self, x: torch.Tensor, sequences: Sequences, taps: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The same, whole sequences of some _PIECE tokens at a time: what lies between operations stays nearer."""
        pieces = list(sequences.pieces(_PIECE))
        if len(pieces) == 1:
            return self.run_one_by_one(x, sequences, taps)
        outputs = {index: torch.empty_like(x) for index in taps}
        ends_in = outputs.get(len(self.blocks) - 1) if self.spec.placement == "post" else None
        last = torch.empty_like(x) if ends_in is None else ends_in
        for tokens, piece in pieces:

            def see(index: int, output: list[torch.Tensor], tokens: slice = tokens) -> None:
                if index in outputs:
                    outputs[index][tokens] = output[0]

            last[tokens] = self._one_by_one([(x[tokens], piece)], see)[0]
        return [outputs[index] for index in taps], last

    def run_visiting(
        self, x: torch.Tensor, sequences: Sequences, taps: tuple[int, ...], visit: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """The last hidden state; each tapped block's output is handed to `visit` as soon as it is there."""
        if self.table is None or why_not_at_once(x, self.table, sequences.offsets.host) is not None:
            return self._visit_one_by_one(x, sequences, taps, visit)
        last = x
        for table, tapped in self._parts(taps):
            places = sequences.offsets.host, tapped, sequences.bias, sequences.rotation
            outputs, last = packed_blocks(x, table, *places)
            for x in outputs:
                visit(x)
        return last

    def _visit_one_by_one(
        self, x: torch.Tensor, sequences: Sequences, taps: tuple[int, ...], visit: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        pieces = [(x, sequences)]
        if self._goes_in_pieces(x):
            pieces = [(x[tokens], piece) for tokens, piece in sequences.pieces(_PIECE)]
        return _joined(
            self._one_by_one(pieces, lambda index, outputs: visit(_joined(outputs)) if index in taps else None)
        )

    def _parts(self, taps: tuple[int, ...]) -> list[tuple[Table, tuple[int, ...]]]:
        """Tables that end behind each tap, and which of a table's blocks is the tap, if any."""
        if taps not in self._tables:
            assert self.table is not None
            blocks, norm, form = self.table.blocks, self.table.final_norm, self.table.form
            ends = sorted({*(tap + 1 for tap in taps), len(blocks)})
            tables: list[tuple[Table, tuple[int, ...]]] = []
            for start, end in itertools.pairwise([0, *ends]):
                part = Table(blocks[start:end], norm if end == len(blocks) else None, form)
                tables.append((part, (end - start - 1,) if end - 1 in taps else ()))
            self._tables[taps] = tables
        return self._tables[taps]

    def _at_once(self) -> Table | None:
        """The blocks as ops.packed_blocks takes them; None where they have more to them than it runs, or are faster
        an operation at a time, by PyTorch's products."""
        blocks = [block.at_once() for block in self.blocks]
        if not blocks or None in blocks or not all(_on_cpu(block.qkv) for block in self.blocks):
            return None
        if self.spec.placement not in ("post", "pre"):
            return None
        if self.spec.placement == "post" and self.final_norm is not None:
            return None
        if self.dtype == torch.float32 and not pays_in_float32():
            return None
        spec, (q_width, k_width, _) = self.spec, self.blocks[0].widths
        form = Form(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            q_width,
            q_width + k_width,
            spec.head_dim**-0.5 if spec.scale is None else spec.scale,
            spec.causal,
            spec.placement,
            spec.norm == "rms",
            self.activation,
        )
        final_norm = None if self.final_norm is None else self.final_norm.weights
        return Table([block for block in blocks if block is not None], final_norm, form)

    def run_one_by_one(
        self, x: torch.Tensor, sequences: Sequences, taps: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The same, an operation at a time."""
        outputs: dict[int, torch.Tensor] = {}

        def see(index: int, output: list[torch.Tensor]) -> None:
            if index in taps:
                outputs[index] = output[0]

        (last,) = self._one_by_one([(x, sequences)], see)
        return [outputs[index] for index in taps], last

    def _one_by_one(
        self, pieces: list[tuple[torch.Tensor, Sequences]], see: Callable[[int, list[torch.Tensor]], None]
    ) -> list[torch.Tensor]:
        """The last hidden states of pieces, which go through a block one after the other; each block's index and its
        outputs are shown to `see`."""
        pre = self.spec.placement != "post"
        first = self.blocks[0].attention_norm if pre and self.blocks else None
        states = [(x, x if first is None else first(x)[1]) for x, _ in pieces]
        for index, block in enumerate(self.blocks):
            after = self.blocks[index + 1].attention_norm if index + 1 < len(self.blocks) else self.final_norm
            for place, (_, sequences) in enumerate(pieces):
                x, normed = states[place]
                if pre:
                    states[place] = self._pre_norm(block, x, normed, sequences, after)
                else:
                    x = self._post_norm(block, x, sequences)
                    states[place] = x, x
            see(index, [x for x, _ in states])
        return [normed for _, normed in states]

    def _post_norm(self, block: PackedBlock, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        _, x = block.attention_norm(self._attend(block, x, sequences), x)
        if block.cross is not None:
            _, x = block.cross.norm(self._attend_memory(block.cross, x, sequences), x)
        return block.feed_forward_norm(self._feed_forward(block, x), x)[1]

    def _pre_norm(
        self, block: PackedBlock, x: torch.Tensor, normed: torch.Tensor, sequences: Sequences, after: Norm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        change = self._attend(block, normed, sequences)
        if block.cross is not None:
            x, normed = block.cross.norm(change, x)
            change = self._attend_memory(block.cross, normed, sequences)
        x, normed = block.feed_forward_norm(change, x)
        change = self._feed_forward(block, normed)
        if after is not None:
            return after(change, x)
        x = x + change
        return x, x

    def _attend(self, block: PackedBlock, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        spec, offsets = self.spec, sequences.offsets
        q, k, v = _linear(x, block.qkv).split(block.widths, dim=-1)
        q, k, v = self._heads(q, spec.heads), self._heads(k, spec.kv_heads), self._heads(v, spec.kv_heads)
        if block.query_norm is not None:
            q = block.query_norm(q)[1]
        if block.key_norm is not None:
            k = block.key_norm(k)[1]
        attended = packed_attention(
            q,
            k,
            v,
            offsets.host,
            scale=spec.scale,
            causal=spec.causal,
            window=block.window,
            bias=sequences.bias,
            rotation=sequences.rotation,
            on_device=(offsets.placed, offsets.placed),
        )
        change = _linear(attended.flatten(1), block.output)
        return change if block.attention_output_norm is None else block.attention_output_norm(change)[1]

    def _attend_memory(self, layer: CrossAttention, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        spec, memory = self.spec, sequences.memory
        assert memory is not None
        k, v = _linear(memory.x, layer.key_value).split(layer.widths, dim=-1)
        attended = packed_attention(
            self._heads(_linear(x, layer.query), spec.heads),
            self._heads(k, spec.heads),
            self._heads(v, spec.heads),
            sequences.offsets.host,
            memory.offsets.host,
            scale=spec.scale,
            on_device=(sequences.offsets.placed, memory.offsets.placed),
        )
        return _linear(attended.flatten(1), layer.output)

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """(T, at least heads hd) to (T, heads, hd)."""
        return x.narrow(1, 0, heads * self.spec.head_dim).unflatten(1, (heads, self.spec.head_dim))

    def _feed_forward(self, block: PackedBlock, x: torch.Tensor) -> torch.Tensor:
        if isinstance(block.up, SharedWeight) and isinstance(block.down, SharedWeight):
            change = block.down.after(block.up, self.activation, x)
        elif x.device.type == "cuda" and len(x) > _HIDDEN_AT_ONCE:
            change = torch.empty_like(x)
            for some, part in zip(change.split(_HIDDEN_AT_ONCE), x.split(_HIDDEN_AT_ONCE), strict=True):
                some.copy_(_linear(_linear(part, block.up, self.activation), block.down))
        else:
            change = _linear(_linear(x, block.up, self.activation), block.down)
        return change if block.feed_forward_output_norm is None else block.feed_forward_output_norm(change)[1]


def _linear(x: torch.Tensor, weight: Weight, activation: str = "none") -> torch.Tensor:
    return weight.linear(x, activation) if isinstance(weight, SharedWeight) else frozen_linear(x, weight, activation)


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _on_cpu(weight: Weight) -> bool:
    """Whether the CPU's kernels read a weight where and as it lies."""
    return weight.device.type == "cpu" and (isinstance(weight, SharedWeight) or weight.layout == PANELS)


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
        device = first_weight(stack).device
        offsets, kept = _offsets(examples, length, mask, device)
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
        memory = _memory(block_inputs) if stack.spec.cross else None
        return cls((examples, length), kept, Sequences(offsets, bias, rotation, memory))

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (tokens, D)."""
        return _pack(x, self.kept)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, D) to (B, S, D), zeros at padding."""
        if self.kept is not None:
            examples, length = self.shape
            x = x.new_zeros(examples * length, x.shape[1]).index_copy_(0, self.kept, x)
        return x.view(*self.shape, -1)


def first_weight(stack: Stack) -> torch.Tensor:
    """A weight of the first block: of prepared ones only norms are parameters, if those."""
    block = stack.blocks[0]
    return next(itertools.chain(block.parameters(), block.buffers()))


def _offsets(
    examples: int, length: int, mask: torch.Tensor | None, device: torch.device
) -> tuple[Offsets, torch.Tensor | None]:
    """Where the sequences of a (B, S) mask begin once they are packed, and the places of their tokens in (B S).

    The places are None where every position is a token, as without a mask.
    """
    offsets = Offsets.of(torch.full((examples,), length) if mask is None else mask.sum(1), device)
    if mask is None or int(offsets.host[-1]) == mask.numel():
        return offsets, None
    return offsets, mask.flatten().nonzero().squeeze(1)


def _pack(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    x = x.flatten(0, 1)
    return x.contiguous() if kept is None else x[kept]


def _memory(block_inputs: dict[str, Any]) -> Memory:
    x, mask = block_inputs["encoder_hidden_states"], block_inputs["encoder_attention_mask"]
    examples, length, _ = x.shape
    offsets, kept = _offsets(examples, length, None if mask is None else mask.bool(), x.device)
    return Memory(_pack(x.to(TOKENS), kept), offsets)


class _Reached(Exception):
    """What the first block was given; the forward ends there."""


def reach_blocks(stack: Stack, module: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The model's own embeddings (B, S, D), and what else it passes to its first block.

    The mask is left out where no position depends on it: the model would make (B, S, S) of it, which nothing reads.
    A decoder's encoder_hidden_states and encoder_attention_mask are as they were given.
    """
    thread = threading.get_ident()

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            raise _Reached(args, kwargs)

    config = getattr(module, "config", None)
    if getattr(config, "model_type", "") not in _MASK_SETS_POSITIONS and "attention_mask" in inputs:
        whole = torch.ones_like(inputs["attention_mask"]) if stack.spec.causal else None
        inputs = inputs | {"attention_mask": whole}
    memory = {}
    if stack.spec.cross:
        memory = {name: inputs.get(name) for name in ("encoder_hidden_states", "encoder_attention_mask")}
        inputs = inputs | {"encoder_attention_mask": None}
    if stack.spec.causal and "use_cache" in inspect.signature(type(module).forward).parameters:
        inputs = inputs | {"use_cache": False}
    handle = stack.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        module(**inputs)
    except _Reached as reached:
        args, kwargs = reached.args
        return (args[0] if args else kwargs["hidden_states"]), kwargs | memory
    finally:
        handle.remove()
    raise AssertionError("the model did not run its blocks")


def contiguous(mask: torch.Tensor | None) -> bool:
    """Whether no sequence has a gap: positions inside it then are differences of places."""
    if mask is None:
        return True
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    return bool((starts <= 1).all())
