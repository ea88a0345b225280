"""The side network's keys and values in transformers' own cache, behind those of the backbone."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..backbone import FrozenBackbone


def new_cache(backbone: FrozenBackbone) -> Any:
    """An empty transformers cache for a decoder, or for an encoder-decoder's decoder."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if backbone.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache()


class SideCache:
    """The part of a transformers cache that the side network uses: layers `first`, `first` + 1, ...

    Beam search reorders, and cropping cuts, all layers of a cache: so backbone and side network stay together.
    past: how many positions were cached when this was made, before the backbone's forward.
    Raises ValueError for a cache that another model filled.
    """

    def __init__(self, cache: Any, first: int) -> None:
        self.past = int(cache.get_seq_length())
        self.first = first
        self.own = getattr(cache, "self_attention_cache", cache)
        self.memory = getattr(cache, "cross_attention_cache", None)
        layers = self.own.layers[first : first + 1]
        if self.past != (layers[0].get_seq_length() if layers else 0):
            raise ValueError(
                f"past_key_values: it holds {self.past} positions of the backbone, and none of this ladder's side "
                "network; pass an empty cache, or one that this ladder filled"
            )

    def slots(self, index: int) -> tuple[Slot, Slot | None]:
        """Where side block `index` keeps what it attends to: its own sequence, and a decoder's memory."""
        place = self.first + index
        return Slot(self.own, place), None if self.memory is None else Slot(self.memory, place)


@functools.cache
def _side_layer() -> type:
    """A layer of a transformers cache that grows; made late: it imports transformers."""
    from transformers.cache_utils import DynamicLayer

    # transformers asks all layers at once whether they are static: a growing one among the backbone's static layers
    # would have it leave out the mask of what those have not filled yet
    return type("SideLayer", (DynamicLayer,), {"is_compileable": True})


class Slot:
    """One layer of a transformers cache, in the layout of tlfast.ops.attention: (B, S, H, head_dim)."""

    def __init__(self, cache: Any, index: int) -> None:
        while len(cache.layers) <= index:
            cache.layers.append(_side_layer()())
        self.cache, self.index = cache, index

    def extend_heads(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values as transformers lays them out, (B, H, S, head_dim); all of them so far."""
        return self.cache.update(keys, values, self.index)

    def read_heads(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What was kept, (B, H, S, head_dim) each, None where nothing was."""
        layer = self.cache.layers[self.index]
        return (layer.keys, layer.values) if layer.get_seq_length() else None

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values of new positions; all of them so far."""
        keys, values = self.extend_heads(k.transpose(1, 2), v.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def read(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What was kept, None where nothing was."""
        kept = self.read_heads()
        return None if kept is None else (kept[0].transpose(1, 2), kept[1].transpose(1, 2))
