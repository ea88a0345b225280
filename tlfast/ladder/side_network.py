"""The side network: rungs and side blocks over the taps of one stack of backbone blocks."""

from __future__ import annotations

import torch
from torch import nn

from ..backbone import BackboneOutput
from ..backbone.stack import Stack
from .attention import RelativeBias, Rotation, rotation_of
from .blocks import SideBlock, reduced
from .cache import SideCache
from .config import LadderConfig
from .decoding import step
from .rung import Rung


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
        self.embedding = nn.Linear(spec.width, side.width)
        nn.init.normal_(self.embedding.weight, std=0.01)
        nn.init.zeros_(self.embedding.bias)
        self.rungs = nn.ModuleList(
            Rung(spec.width, side.width, config.gate_temperature, config.gate) for _ in range(count)
        )
        self.blocks = nn.ModuleList(SideBlock(side, memory_width) for _ in range(count))
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
        s = self.embedding(output.embedding.to(self.embedding.weight.dtype))
        past = 0 if cache is None else cache.past
        bias = None if self.relative_bias is None else self.relative_bias(s.shape[1], past)
        if position_ids is None:
            position_ids = torch.arange(past, past + s.shape[1], device=s.device)[None]
        rotations: dict[str | None, Rotation | None] = {None: None}
        for name in self._frequency_names:
            if name not in rotations:
                rotations[name] = rotation_of(getattr(self, str(name)), position_ids, self.rotary_scaling)
        layers = zip(output.taps, self.rungs, self.blocks, self._frequency_names, strict=True)
        for index, (tap, rung, block, name) in enumerate(layers):
            slots = (None, None) if cache is None else cache.slots(index)
            if (
                slots[0] is not None
                and memory is None
                and s.shape[1] == 1
                and not (self.training or torch.is_grad_enabled())
            ):
                s = step(block, rung, tap, s, key_mask, bias, rotations[name], slots[0])
            else:
                s = block(rung(tap, s), key_mask, bias, rotations[name], memory, memory_mask, *slots)
        return self.norm(s)
