"""What an emulator's middle is made of: fewer blocks, thinner matrices, fewer channels or fewer bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..backbone.families import gate_of
from ..backbone.parts import BlockParts, Part, linears_of
from .architecture import find_blocks
from .block_map import BlockMap, check_adapter, emulator_blocks
from .encoding import Encoded, encode

ALLOWED = '"keep:N", "keep:all", "svd:RANK", "prune:FRACTION", "int8" or "nf4"'


@dataclass(frozen=True)
class Recipe:
    """kind: "keep", "svd", "prune", "int8" or "nf4". amount: blocks (None: all), rank, or share of channels."""

    kind: str
    amount: float | None = None

    @classmethod
    def of(cls, text: str) -> Recipe:
        """Read "keep:2", "keep:all", "svd:96", "prune:0.5", "int8" or "nf4"; ValueError for anything else."""
        kind, _, amount = text.partition(":") if isinstance(text, str) else ("", "", "")
        try:
            if text in ("int8", "nf4", "keep:all"):
                return cls(kind)
            if kind in ("keep", "svd") and amount.isascii() and amount.isdigit() and int(amount) > 0:
                return cls(kind, int(amount))
            if kind == "prune" and 0 < float(amount) < 1:
                return cls(kind, float(amount))
        except ValueError:
            pass
        raise ValueError(
            f"emulator: {text!r} is not available; pass {ALLOWED}, with N and RANK of at least 1 and FRACTION between "
            "0 and 1"
        )

    def block_map(self, total: int, adapter: tuple[int, int]) -> BlockMap:
        """Which blocks the emulator has; ValueError as `emulator_blocks`."""
        first, last = check_adapter(total, adapter)
        middle = list(range(first, total - last))
        if self.kind == "keep" and self.amount is not None:
            middle = emulator_blocks(total, (first, last), int(self.amount))
        return BlockMap(total, (first, last), tuple(middle))

    def apply(self, emulator: Any, blocks: BlockMap) -> dict[str, Encoded]:
        """Compress the middle of a full-width emulator in place; what is stored otherwise than as numbers, by name.

        Raises ValueError for a rank that is no compression.
        """
        if self.kind == "keep":
            return {}
        stack = find_blocks(emulator)
        middle = [stack.blocks[place] for place in blocks.middle_places]
        if self.kind == "prune":
            assert stack.parts is not None and self.amount is not None
            for block in middle:
                prune_channels(block, stack.parts, self.amount)
            return {}
        return self._encode(emulator, middle)

    @torch.no_grad()
    def _encode(self, emulator: Any, middle: list[Any]) -> dict[str, Encoded]:
        linears = {id(module) for block in middle for module in linears_of(block)}
        names = {f"{name}.weight": module for name, module in emulator.named_modules() if id(module) in linears}
        rank, kind = int(self.amount or 0), "low-rank" if self.kind == "svd" else self.kind
        least = min(min(module.weight.shape) for module in names.values())
        if rank >= least:
            raise ValueError(f"emulator: rank {rank} is that of a matrix of the middle as it is; pass 1 to {least - 1}")
        encoded = {}
        for name, module in names.items():
            encoded[name] = encode(kind, module.weight, rank)
            module.weight.copy_(encoded[name].value())
        return encoded


@torch.no_grad()
def prune_channels(block: Any, parts: BlockParts, fraction: float) -> None:
    """Set a fraction of the feed-forward's channels of a block to zero: those whose weights are smallest.

    A channel's size is |up| |down|, times |gate| where there is one, of its weights.
    Source of magnitude pruning: Han et al., "Learning both weights and connections", NeurIPS 2015 (arXiv 1506.02626).
    """
    up, down = (Part.of(block, path) for path in (parts.feed_forward.up, parts.feed_forward.down))
    gate = gate_of(parts, block)
    sizes = up.weight.norm(dim=1) * down.weight.norm(dim=0)
    if gate is not None:
        sizes = sizes * gate.weight.norm(dim=1)
    gone = sizes.argsort()[: math.floor(fraction * len(sizes))]
    down.weight[:, gone] = 0
    for part in (up, gate):
        if part is not None:
            part.weight[gone] = 0
            if part.bias is not None:
                part.bias[gone] = 0
