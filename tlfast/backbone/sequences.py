"""Sequences packed one behind the other: where they begin, and what their attention needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Offsets:
    """Where packed sequences begin, int32 (B + 1,): on the host, where their lengths are known without waiting for a
    GPU, and on the device of their tokens."""

    host: torch.Tensor
    placed: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, device: torch.device) -> Offsets:
        """counts: the lengths (B,), on any device; one that is not the host is waited for."""
        host = F.pad(counts.cpu().cumsum(0), (1, 0)).to(torch.int32)
        return cls(host, host.to(device))


@dataclass(frozen=True)
class Memory:
    """What a decoder attends to: an encoder's last hidden state, packed (tokens, D), and where its sequences begin."""

    x: torch.Tensor
    offsets: Offsets


@dataclass(frozen=True)
class Sequences:
    """Which tokens are packed, and what their attention needs: see ops.packed_attention."""

    offsets: Offsets
    bias: torch.Tensor | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    memory: Memory | None = None

    def pieces(self, tokens: int) -> Iterator[tuple[slice, Sequences]]:
        """Of sequences without memory: which tokens, and their sequences; at least `tokens` each but for the last."""
        offsets = self.offsets.host.tolist()
        first = 0
        for last, end in enumerate(offsets):
            if last + 1 < len(offsets) and (last == first or end - offsets[first] < tokens):
                continue
            rows = slice(offsets[first], end)
            part = self.offsets.host[first : last + 1] - offsets[first]
            rotation = None if self.rotation is None else (self.rotation[0][rows], self.rotation[1][rows])
            yield rows, Sequences(Offsets(part, part.to(self.offsets.placed.device)), self.bias, rotation)
            first = last
