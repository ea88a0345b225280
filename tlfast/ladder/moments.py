"""What the starting weights of a side network are chosen by: moments of the taps, energies inside the blocks."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from ..backbone import BackboneOutput, FrozenBackbone
from ..backbone.parts import AttentionParts, BlockParts, Part

CROSS = "cross_"  # before the names of a cross-attention's parts


@dataclass
class Spread:
    """Running sums over tokens: how many, of their states, and of the states' outer products."""

    count: int
    total: torch.Tensor  # (D,)
    outer: torch.Tensor  # (D, D)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Self:
        """Nothing seen yet."""
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, zeros, torch.outer(zeros, zeros))

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.outer / self.count - torch.outer(self.mean, self.mean)

    def add_states(self, states: torch.Tensor) -> None:
        """Add states (tokens, D)."""
        states = states.double()
        self.count += states.shape[0]
        self.outer += states.T @ states
        self.total += states.sum(0)


@dataclass
class Moments(Spread):
    """Those of a stack's stream over its valid tokens, however many taps see each; energies inside its blocks.

    each: of the embedding and of every tap its own; empty where nobody asked for them.
    """

    energy: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)  # mean squares are these over count
    each: list[Spread] = field(default_factory=list)

    def add(self, output: BackboneOutput) -> None:
        """Add the taps of a packed output, each token as one, however many taps there are."""
        self.count += output.embedding.shape[0]
        for tap in output.taps:
            tap = tap.double() / len(output.taps) ** 0.5
            self.outer += tap.T @ tap
            self.total += tap.sum(0) / len(output.taps) ** 0.5
        if self.each:
            for spread, states in zip(self.each, (output.embedding, *output.taps), strict=True):
                spread.add_states(states)

    def expect_energy(self, key: tuple[int, str], channels: int) -> None:
        """Have an entry for these channels even where no batch holds a token: processes add up the same entries."""
        self.energy.setdefault(key, self.total.new_zeros(channels))

    def add_energy(self, key: tuple[int, str], x: torch.Tensor) -> None:
        """Add the squares of channels x, (tokens, channels)."""
        self.energy[key] += x.double().square().sum(0)

    def gather(self) -> None:
        """Add up what the processes of a distributed run saw, so that all of them start from the same weights."""
        if not is_distributed():
            return
        count = torch.tensor(self.count, device=self.total.device)
        of_each = [tensor for spread in self.each for tensor in (spread.total, spread.outer)]
        for tensor in (count, self.total, self.outer, *(self.energy[key] for key in sorted(self.energy)), *of_each):
            torch.distributed.all_reduce(tensor)
        self.count = int(count)
        for spread in self.each:
            spread.count = self.count


@torch.no_grad()
def measure(
    backbone: FrozenBackbone, batches: Iterable[Mapping[str, Any]], of_each: Container[str] = ()
) -> dict[str, Moments]:
    """Moments of every stack over the batches' valid tokens; `of_each` names stacks whose every tap has its own too.

    In a distributed run, over those of all processes: each must call this, whatever it has of batches.
    """
    _check_same_backbone(backbone)
    device = next(backbone.parameters()).device
    moments = {name: Moments.empty(stack.spec.width, device) for name, stack in backbone.stacks.items()}
    for name, stack in backbone.stacks.items():
        if name in of_each:
            moments[name].each = [Spread.empty(stack.spec.width, device) for _ in range(1 + len(stack.taps))]
    with backbone.through_modules(), _EnergyHooks(backbone, moments) as hooks:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
            hooks.masks = [_bool(inputs.get(name)) for name in ("attention_mask", "decoder_attention_mask")]
            output = backbone(**inputs, packed=True)
            parts = (output.encoder, output.decoder) if backbone.is_encoder_decoder else (output,)
            for stack_moments, part in zip(moments.values(), parts, strict=True):
                stack_moments.add(part)
    for stack_moments in moments.values():
        stack_moments.gather()
        if stack_moments.count == 0:
            raise ValueError("calibration: the batches hold no token; pass at least one batch with text")
    return moments


def _check_same_backbone(backbone: FrozenBackbone) -> None:
    """ValueError in every process where they have different backbones: the weights are never sent."""
    if not is_distributed():
        return
    device = next(backbone.parameters()).device
    mine = torch.tensor(int(backbone.fingerprint()[:15], 16), device=device)
    least, most = mine.clone(), mine.clone()
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if least != most:
        raise ValueError(
            "backbone: the processes have different weights, and a frozen backbone is never sent; load the same "
            "checkpoint in all of them, or call torch.manual_seed before making a random model"
        )


def is_distributed() -> bool:
    """Whether this is one of the processes of a distributed run."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _EnergyHooks:
    """While entered, adds each block's squared queries, keys, values and feed-forward activations to the moments.

    masks: of the batch under way, those of each stack's tokens; to be set before the forward.
    """

    def __init__(self, backbone: FrozenBackbone, moments: dict[str, Moments]) -> None:
        self.backbone, self.moments = backbone, moments
        self.masks: list[torch.Tensor | None] = []
        self.handles: list[Any] = []

    def __enter__(self) -> _EnergyHooks:
        for number, (name, stack) in enumerate(self.backbone.stacks.items()):
            if stack.parts is not None:
                for index in stack.taps:
                    self._watch(stack.blocks[index], stack.parts, index, self.moments[name], number)
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _watch(self, block: nn.Module, parts: BlockParts, index: int, moments: Moments, stack: int) -> None:
        self._watch_attention(block, parts.attention, index, "", moments, (stack, stack))
        if parts.cross_attention is not None:
            self._watch_attention(block, parts.cross_attention, index, CROSS, moments, (stack, 0))
        down = Part.of(block, parts.feed_forward.down)
        moments.expect_energy((index, "down"), down.weight.shape[1])
        self.handles.append(down.module.register_forward_hook(self._adder(moments, (index, "down"), stack, None)))

    def _watch_attention(
        self,
        block: nn.Module,
        parts: AttentionParts,
        index: int,
        prefix: str,
        moments: Moments,
        stacks: tuple[int, int],
    ) -> None:
        """stacks: of which tokens the queries are, and the keys and values."""
        for name, stack in (("query", stacks[0]), ("key", stacks[1]), ("value", stacks[1])):
            part, key = Part.of(block, getattr(parts, name)), (index, prefix + name)
            moments.expect_energy(key, part.weight.shape[0])
            self.handles.append(part.module.register_forward_hook(self._adder(moments, key, stack, part)))

    def _adder(self, moments: Moments, key: tuple[int, str], stack: int, part: Part | None) -> Any:
        """A hook that adds a part's output, or without a part the layer's input."""
        thread = threading.get_ident()  # others may run the shared model at the same time

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if threading.get_ident() != thread:
                return
            x, mask = args[0] if part is None else part.take(output), self.masks[stack]
            moments.add_energy(key, x.reshape(-1, x.shape[-1]) if mask is None else x.reshape(*mask.shape, -1)[mask])

        return hook


def _bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.bool()
