"""The side networks of several ladders of equal shape, as one batched computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..backbone import BackboneOutput
from ..backbone.parts import BlockSpec
from .attention import Rotation, rotation_of
from .blocks import SideBlock
from .stacked_layers import Affine, StackedFeedForward, StackedLinear, exact, normed, rounded, stacked_attention

_STATE_ELEMENTS = 2**18  # 1 MiB in float32


class StackedSides:
    """K side networks of one `SideShape`; their weights are copies.

    Called with the backbone's output (its taps those of the shape), a (B, S) bool mask of tokens and position_ids;
    returns (K, B, S, R), for each ladder what its SideNetwork gives. A tap is read by one product for all ladders, and
    so are the embeddings; inside the blocks the ladders are a batch dimension. Of a large batch so many sequences are
    taken at a time that the state of all ladders fits into a core's cache.
    """

    def __init__(self, sides: Sequence[Any]) -> None:
        first = sides[0]
        self.count, self.width = len(sides), first.width
        self.spec: BlockSpec = first.blocks[0].spec
        self.rotary_scaling = first.rotary_scaling
        self.frequency_names: list[str | None] = first._frequency_names
        self.frequencies = {name: getattr(first, name) for name in self.frequency_names if name is not None}
        self.embedding = _Down.of([side.embedding for side in sides])
        self.rungs: list[_Rung] = []
        self.blocks: list[_Block] = []
        pending: Affine | None = None  # of the norm behind the previous block
        layers = zip(*(zip(side.rungs, side.blocks, strict=True) for side in sides), strict=True)
        for rungs, blocks in (zip(*layer, strict=True) for layer in layers):
            self.rungs.append(_Rung(rungs, pending))
            self.blocks.append(_Block(blocks))
            pending = (
                Affine.of([block.feed_forward_norm for block in blocks]) if self.spec.placement == "post" else None
            )
        like = first.embedding.weight
        self.last = None if pending is None else _rounded(pending, like)
        self.norm = _rounded(Affine.of([side.norm for side in sides]), like)

    def __call__(
        self, output: BackboneOutput, key_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        batch, length, _ = output.embedding.shape
        size = max(1, _STATE_ELEMENTS // max(1, self.count * length * self.width))
        if size >= batch:
            return self._climb(output.embedding, output.taps, key_mask, position_ids)
        parts = []
        for start in range(0, batch, size):
            part = slice(start, start + size)
            mask = None if key_mask is None else key_mask[part]
            positions = position_ids if position_ids is None or len(position_ids) == 1 else position_ids[part]
            parts.append(self._climb(output.embedding[part], [tap[part] for tap in output.taps], mask, positions))
        return torch.cat(parts, dim=1)

    def _climb(
        self,
        embedding: torch.Tensor,
        taps: Sequence[torch.Tensor],
        key_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, length, _ = embedding.shape
        shape = (self.count * batch, length, self.width)
        mask = None if key_mask is None else key_mask.repeat(self.count, 1)
        rotations = self._rotations(length, position_ids, embedding.device)
        x = self.embedding(embedding).contiguous()
        for tap, rung, block, rotation in zip(taps, self.rungs, self.blocks, rotations, strict=True):
            x = block(rung(tap, x), shape, mask, rotation)
        if self.last is not None:
            x = _apply(self.last, x)
        return _apply(self.norm, normed(x, self.spec.norm, self.spec.eps)).view(self.count, batch, length, self.width)

    def _rotations(self, length: int, position_ids: torch.Tensor | None, device: torch.device) -> list[Rotation | None]:
        """One for each block; those of different positions in a batch are repeated for the ladders."""
        if position_ids is None:
            position_ids = torch.arange(length, device=device)[None]
        elif position_ids.shape[0] > 1:
            position_ids = position_ids.repeat(self.count, 1)
        made = {
            name: rotation_of(frequencies, position_ids, self.rotary_scaling)
            for name, frequencies in self.frequencies.items()
        }
        return [made.get(name) for name in self.frequency_names]


class _Down(NamedTuple):
    """One product of a backbone state with the weights of all ladders. (B, S, D) -> a (K, B S, R) view."""

    weight: torch.Tensor  # (K R, D)
    bias: torch.Tensor  # (K R,)
    ladders: int

    @classmethod
    def of(cls, linears: Sequence[Any], scale: torch.Tensor | None = None, shift: torch.Tensor | None = None) -> _Down:
        """scale (K, 1, R) multiplies the outputs; shift is then added."""
        weight, bias = exact([linear.weight for linear in linears]), exact([linear.bias for linear in linears])
        if scale is not None:
            weight, bias = scale.mT * weight, scale[:, 0] * bias
        if shift is not None:
            bias = bias + shift
        like = linears[0].weight
        return cls(rounded(weight.flatten(0, 1), like), rounded(bias.flatten(), like), len(linears))

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        rows = F.linear(h.reshape(-1, h.shape[-1]).to(self.weight.dtype), self.weight, self.bias)
        return rows.unflatten(-1, (self.ladders, -1)).transpose(0, 1)


class _Rung:
    """z = mu s + (1 - mu)(W h + b), with 1 - mu in the weights, and with the affine part that s still lacks."""

    def __init__(self, rungs: Sequence[Any], pending: Affine | None) -> None:
        width = rungs[0].weight.shape[0]
        gates = exact([(rung.alpha.detach().double() / rung.temperature).expand(width) for rung in rungs])[:, None]
        mu, rest = torch.sigmoid(gates), torch.sigmoid(-gates)
        shift = mu.new_zeros(())
        if pending is not None:
            if pending.shift is not None:
                shift = (mu * pending.shift)[:, 0]
            mu = mu * pending.scale
        self.down = _Down.of(rungs, rest, shift)
        self.mu = rounded(mu, rungs[0].weight)

    def __call__(self, tap: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Overwrites s."""
        # written ladder by ladder, whereas the product is token by token
        return torch.addcmul(self.down(tap), self.mu, s, out=s)


class _Block:
    """One side block of each ladder, on a stream (K, T, R), which it overwrites.

    Post-norm blocks return the last norm's result without its affine part.
    """

    def __init__(self, blocks: Sequence[SideBlock]) -> None:
        spec = blocks[0].spec
        self.norm, self.eps, self.placement = spec.norm, spec.eps, spec.placement
        post = spec.placement == "post"
        attention_norm = Affine.of([block.attention_norm for block in blocks])
        feed_forward_norm = Affine.of([block.feed_forward_norm for block in blocks])
        self.attention = stacked_attention([block.attention for block in blocks], None if post else attention_norm)
        self.attention_output = StackedLinear.of([block.attention.output for block in blocks])
        self.feed_forward = StackedFeedForward(
            [block.feed_forward for block in blocks], attention_norm if post else feed_forward_norm
        )
        like = blocks[0].feed_forward.down.weight
        self.between = _rounded(attention_norm, like) if post else None
        self.output_norms = []
        if spec.placement == "sandwich":
            for name in ("attention_output_norm", "feed_forward_output_norm"):
                self.output_norms.append(_rounded(Affine.of([getattr(block, name) for block in blocks]), like))

    def __call__(
        self, x: torch.Tensor, shape: tuple[int, ...], mask: torch.Tensor | None, rotation: Rotation | None
    ) -> torch.Tensor:
        run = {"post": self._post, "pre": self._pre, "sandwich": self._sandwich}[self.placement]
        return run(x, lambda y: self.attention(y.view(shape), key_mask=mask, rotation=rotation))

    def _post(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        assert self.between is not None
        y = self._normed(self.attention_output.add_to(x, attend(x)))
        return self._normed(self.feed_forward.add_to(_apply(self.between, y), y))

    def _pre(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self.attention_output.add_to(x, attend(self._normed(x)))
        return self.feed_forward.add_to(x, self._normed(x))

    def _sandwich(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        nothing = torch.zeros_like(x)
        attended = self.attention_output.add_to(nothing, attend(self._normed(x)))
        x += _apply(self.output_norms[0], self._normed(attended))
        fed = self.feed_forward.add_to(nothing.zero_(), self._normed(x))
        return x.add_(_apply(self.output_norms[1], self._normed(fed)))

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return normed(x, self.norm, self.eps)


def _rounded(affine: Affine, like: torch.Tensor) -> Affine:
    return Affine(rounded(affine.scale, like), None if affine.shift is None else rounded(affine.shift, like))


def _apply(affine: Affine, x: torch.Tensor) -> torch.Tensor:
    if affine.shift is None:
        return x * affine.scale
    return torch.addcmul(affine.shift, x, affine.scale)
