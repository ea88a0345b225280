"""The side network: rungs and side blocks over the taps of one stack of backbone blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..backbone import BackboneOutput
from ..backbone.stack import Stack
from .attention import RelativeBias, Rotation, rotation_of
from .blocks import SideBlock, reduced
from .cache import SideCache
from .config import LadderConfig
from .decoding import step
from .graphs import share_graphs
from .rung import Entrance, Rung
from .tap_storage import Int8, Keep, Offload


class SideNetwork(nn.Module):
    """s = W_emb e + b_emb; for each kept block i: s = rung_i(h_i, s), s = block_i(s); at the end a norm.

    stack: its taps are the kept blocks. memory_width: of the side encoder that a decoder's blocks attend to.
    forward(output, key_mask): the backbone's output and a (B, past + S) bool mask; returns (B, S, R), R = D /
    reduction. position_ids (B or 1, S) turn rotary blocks; memory (B, M, R) and memory_mask belong to a decoder; cache
    holds the past.
    Source: Sung et al. 2022 (arXiv 2206.06522), sections 3.1 and 3.2.
    """

    def __init__(self, stack: Stack, config: LadderConfig, memory_width: int | None = None) -> None:
        super().__init__()
        spec = stack.spec
        side = reduced(spec, config.reduction, config.dropout)
        count = len(stack.taps)
        self.width = side.width
        tap_dim = config.tap_dim if config.tap_storage == "project" else None
        self.tap_storage = config.tap_storage
        self.precision = config.side_precision
        self.embedding = Entrance(spec.width, side.width, tap_dim)
        self.rungs = nn.ModuleList(
            Rung(spec.width, side.width, config.gate_temperature, config.gate, tap_dim) for _ in range(count)
        )
        self.blocks = nn.ModuleList(SideBlock(side, memory_width) for _ in range(count))
        share_graphs(self.blocks)
        rms = spec.norm == "rms"
        self.norm = nn.RMSNorm(side.width, eps=side.eps) if rms else nn.LayerNorm(side.width, eps=side.eps)
        self.relative_bias = RelativeBias(side) if spec.positions == "relative" else None
        self.rotary_scaling = float(getattr(stack.rotary, "attention_scaling", 1.0))
        self._frequency_names = [self._add_frequencies(stack, index, config.reduction) for index in stack.taps]

    def _add_frequencies(self, stack: Stack, index: int, reduction: int) -> str | None:
        """Register the frequencies of one block, once where blocks share them; the name of the buffer.

        Of the backbone's pairs of channels every reduction-th is kept, and so is its frequency.
        """
        frequencies = stack.inverse_frequencies(index)
        if frequencies is None:
            return None
        name = f"inverse_frequencies_{stack.layer_types[index]}" if stack.layer_types else "inverse_frequencies"
        if not hasattr(self, name):
            self.register_buffer(name, frequencies[::reduction].detach().clone().float(), persistent=False)
        return name

    def forward(
        self,
        output: BackboneOutput,
        key_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        cache: SideCache | None = None,
    ) -> torch.Tensor:
        climb = Climb(self, key_mask, position_ids, memory, memory_mask, cache)
        climb(output.embedding)
        for tap in output.taps:
            climb(tap)
        return climb.end()

    def storage(self) -> Keep:
        """How the taps of one forward are kept, for a backward pass that is to come; "stream" needs `Stream`."""
        made = {"int8": Int8, "offload": Offload}.get(self.tap_storage, Keep)
        return made() if torch.is_grad_enabled() else Keep()

    def autocast(self, device_type: str) -> AbstractContextManager[Any]:
        """In which it computes: autocast in bfloat16 where its precision is "bf16", else as the caller has it."""
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Climb:
    """One forward of a side network: called with the embedding, then with each tap; `end` gives its output.

    It can run while the backbone does, which builds no graph: the gradient mode is that of where it was made. The
    arguments are those of `SideNetwork`; storage None: as the side network has it.
    """

    def __init__(
        self,
        side: SideNetwork,
        key_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        memory_mask: torch.Tensor | None = None,
        cache: SideCache | None = None,
        storage: Keep | None = None,
    ) -> None:
        self.side, self.key_mask, self.position_ids, self.cache = side, key_mask, position_ids, cache
        self.memory = (memory, memory_mask)
        self.storage = side.storage() if storage is None else storage
        self.with_grad = torch.is_grad_enabled()
        self.index = -1  # of the last tap
        self.s: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.rotations: dict[str | None, Rotation | None] = {None: None}

    def __call__(self, h: torch.Tensor) -> None:
        # a cache is read by operations for one token, in float32
        autocast = nullcontext() if self.cache is not None else self.side.autocast(h.device.type)
        with torch.set_grad_enabled(self.with_grad), autocast:
            self.s = self._start(h) if self.s is None else self._climb(h, self.s)

    def end(self) -> torch.Tensor:
        """(B, S, R), after the last tap."""
        assert self.index == len(self.side.rungs) - 1 and self.s is not None
        # modules under autocast give bfloat16, and what comes behind a side network has float32 weights
        s = self.s.to(self.side.norm.weight.dtype) if self.side.precision == "bf16" else self.s
        return self.side.norm(s)

    def _start(self, embedding: torch.Tensor) -> torch.Tensor:
        side = self.side
        s = self.storage.enter(side.embedding, embedding)
        past = 0 if self.cache is None else self.cache.past
        self.bias = None if side.relative_bias is None else side.relative_bias(s.shape[1], past)
        position_ids = self.position_ids
        if position_ids is None:
            position_ids = torch.arange(past, past + s.shape[1], device=s.device)[None]
        for name in side._frequency_names:
            if name not in self.rotations:
                self.rotations[name] = rotation_of(getattr(side, str(name)), position_ids, side.rotary_scaling)
        return s

    def _climb(self, tap: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        self.index += 1
        side, (memory, memory_mask) = self.side, self.memory
        rung: Any = side.rungs[self.index]
        block = side.blocks[self.index]
        rotation = self.rotations[side._frequency_names[self.index]]
        slots = (None, None) if self.cache is None else self.cache.slots(self.index)
        generating = not (side.training or torch.is_grad_enabled())
        if slots[0] is not None and memory is None and s.shape[1] == 1 and generating:
            return step(block, rung, rung.project(tap), s, self.key_mask, self.bias, rotation, slots[0])
        z = self.storage.climb(rung, tap, s)
        return block(z, self.key_mask, self.bias, rotation, memory, memory_mask, *slots)
