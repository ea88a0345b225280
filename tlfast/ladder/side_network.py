"""The side network: rungs and side blocks over the taps of one stack of backbone blocks."""

from __future__ import annotations

import torch
from torch import nn

from ..backbone import BackboneOutput, FrozenBackbone
from .blocks import SideBlock, reduced
from .config import LadderConfig
from .rung import Rung


class SideNetwork(nn.Module):
    """s = W_emb e + b_emb; for each kept block i: s = rung_i(h_i, s), s = block_i(s); at the end a LayerNorm.

    backbone: its taps are the kept blocks. forward(output, key_mask): the backbone's output and a (B, S) bool mask;
    returns (B, S, R), R = D / reduction.
    Source: Sung et al. 2022 (arXiv 2206.06522), sections 3.1 and 3.2.
    """

    def __init__(self, backbone: FrozenBackbone, config: LadderConfig) -> None:
        super().__init__()
        spec = backbone.block_spec
        side = reduced(spec, config.reduction, config.dropout)
        count = len(backbone.tap_indices)
        self.embedding = nn.Linear(spec.width, side.width)
        nn.init.normal_(self.embedding.weight, std=0.01)
        nn.init.zeros_(self.embedding.bias)
        self.rungs = nn.ModuleList(
            Rung(spec.width, side.width, config.gate_temperature, config.gate) for _ in range(count)
        )
        self.blocks = nn.ModuleList(SideBlock(side) for _ in range(count))
        self.norm = nn.LayerNorm(side.width, eps=side.eps)

    def forward(self, output: BackboneOutput, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        s = self.embedding(output.embedding)
        for tap, rung, block in zip(output.taps, self.rungs, self.blocks, strict=True):
            s = block(rung(tap, s), key_mask)
        return self.norm(s)
