"""What the starting weights of a side network are chosen by: moments of the taps, energies inside the blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backbone import BackboneOutput, FrozenBackbone
from ..backbone.parts import AttentionParts, BlockParts, Part
from ..backbone.stack import Stack

CROSS = "cross_"  # before the names of a cross-attention's parts


@dataclass
class Moments:
    """Running sums over a stack's valid tokens: count, sum and outer products of the stream, energies by block."""

    count: int
    total: torch.Tensor  # (D,)
    outer: torch.Tensor  # (D, D)
    energy: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)  # mean squares are these over count

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        """Nothing seen yet."""
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, torch.outer(zeros, zeros))

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.outer / self.count - torch.outer(self.mean, self.mean)

    def add(self, output: BackboneOutput) -> None:
        """Add the taps of a packed output, each token as one, however many taps there are."""
        self.count += output.embedding.shape[0]
        for tap in output.taps:
            tap = tap.double() / len(output.taps) ** 0.5
            self.outer += tap.T @ tap
            self.total += tap.sum(0) / len(output.taps) ** 0.5

    def add_energy(self, key: tuple[int, str], x: torch.Tensor) -> None:
        """Add the squares of channels x, (tokens, channels)."""
        self.energy[key] = self.energy.get(key, 0) + x.double().square().sum(0)

    def gather(self) -> None:
        """Add up what the processes of a distributed run saw, so that all of them start from the same weights."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        count = torch.tensor(self.count, device=self.total.device)
        for tensor in (count, self.total, self.outer, *(self.energy[key] for key in sorted(self.energy))):
            torch.distributed.all_reduce(tensor)
        self.count = int(count)


@torch.no_grad()
def measure(backbone: FrozenBackbone, batches: Iterable[Mapping[str, Any]]) -> dict[str, Moments]:
    """Moments of every stack over the batches' valid tokens. In a distributed run, over those of all processes."""
    device = next(backbone.parameters()).device
    moments = {name: Moments.empty(stack.spec.width, device) for name, stack in backbone.stacks.items()}
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
        masks = [_bool(inputs.get("attention_mask"))]
        if backbone.is_encoder_decoder:
            masks.append(_bool(inputs.get("decoder_attention_mask")))
        with _EnergyHooks(backbone, moments, masks):
            output = backbone(**inputs, packed=True)
        parts = (output.encoder, output.decoder) if backbone.is_encoder_decoder else (output,)
        for stack_moments, part in zip(moments.values(), parts, strict=True):
            stack_moments.add(part)
    for stack_moments in moments.values():
        stack_moments.gather()
        if stack_moments.count == 0:
            raise ValueError("calibration: the batches hold no token; pass at least one batch with text")
    return moments


class _EnergyHooks:
    """While entered, adds each block's squared queries, keys, values and feed-forward activations to the moments."""

    def __init__(self, backbone: FrozenBackbone, moments: dict[str, Moments], masks: list[torch.Tensor | None]) -> None:
        self.backbone, self.moments, self.masks = backbone, moments, masks
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for (name, stack), mask in zip(self.backbone.stacks.items(), self.masks, strict=True):
            if stack.parts is None:
                continue
            for index in stack.taps:
                self._watch(stack, stack.parts, index, self.moments[name], mask)

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _watch(self, stack: Stack, parts: BlockParts, index: int, moments: Moments, mask: torch.Tensor | None) -> None:
        block = stack.blocks[index]
        self._watch_attention(block, parts.attention, index, "", moments, (mask, mask))
        if parts.cross_attention is not None:
            self._watch_attention(block, parts.cross_attention, index, CROSS, moments, (mask, self.masks[0]))
        down = Part.of(block, parts.feed_forward.down).module
        self.handles.append(down.register_forward_hook(self._adder(moments, (index, "down"), mask, None)))

    def _watch_attention(
        self,
        block: nn.Module,
        parts: AttentionParts,
        index: int,
        prefix: str,
        moments: Moments,
        masks: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None:
        for name, mask in (("query", masks[0]), ("key", masks[1]), ("value", masks[1])):
            part = Part.of(block, getattr(parts, name))
            hook = self._adder(moments, (index, prefix + name), mask, part)
            self.handles.append(part.module.register_forward_hook(hook))

    def _adder(self, moments: Moments, key: tuple[int, str], mask: torch.Tensor | None, part: Part | None) -> Any:
        """A hook that adds a part's output, or without a part the layer's input."""
        thread = threading.get_ident()  # others may run the shared model at the same time

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if threading.get_ident() != thread:
                return
            x = args[0] if part is None else part.take(output)
            moments.add_energy(key, x.reshape(-1, x.shape[-1]) if mask is None else x.reshape(*mask.shape, -1)[mask])

        return hook


def _bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.bool()
