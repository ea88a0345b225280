"""From a batch to one vector an example: which hidden states are read, and how they are pooled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F

from ..backbone import BackboneOutput, FrozenBackbone, resolve_layers
from ..ladder.config import POOLINGS
from ..ladder.heads import default_pooling


@dataclass(frozen=True)
class Extractor:
    """One vector an example from a frozen backbone; of an encoder-decoder from its encoder alone.

    layer: the block whose output is read, None for the last hidden state. width: D of the vectors.
    normalize: to length 1. device: the backbone's.
    """

    backbone: FrozenBackbone
    pooling: str
    layer: int | None
    normalize: bool
    width: int
    device: str

    @classmethod
    def of(
        cls,
        backbone: FrozenBackbone,
        pooling: str | None = None,
        layer: int | None = None,
        normalize: bool = False,
        device: str = "cpu",
    ) -> Self:
        """An extractor with its settings checked. pooling: None takes `default_pooling`; layer: negative from the end.

        Raises ValueError for a pooling or a block that is not there.
        """
        if pooling is None:
            pooling = default_pooling(backbone)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: {pooling!r} is not available; allowed: {', '.join(map(repr, POOLINGS))}")
        stack = backbone.stacks["encoder"] if backbone.is_encoder_decoder else backbone.stack
        taps = () if layer is None else resolve_layers("layer", [layer], len(stack.blocks))
        tapped = backbone.with_taps((), encoder=taps) if backbone.is_encoder_decoder else backbone.with_taps(taps)
        of_blocks = layer is not None or backbone.is_encoder_decoder  # which OPT-350m's last hidden state is not
        width = stack.spec.width if of_blocks else backbone.output_width
        return cls(tapped, pooling, taps[0] if taps else None, normalize, width, device)

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """transformers' inputs of B examples -> (B, D) float32 on the device; an example without tokens is zeros."""
        output = self._forward({name: tensor.to(self.device) for name, tensor in batch.items()})
        assert output.cu_seqlens is not None
        hidden = output.taps[0] if output.taps else output.last_hidden_state
        vectors = pool_packed(hidden, output.cu_seqlens, self.pooling)
        return F.normalize(vectors, dim=1) if self.normalize else vectors

    def _forward(self, batch: dict[str, Any]) -> BackboneOutput:
        if not self.backbone.is_encoder_decoder:
            return self.backbone(packed=True, **batch)
        output, mask = self.backbone.encode(**batch), batch["attention_mask"].bool()
        bounds = F.pad(mask.sum(dim=1).cumsum(dim=0), (1, 0))
        taps = tuple(tap[mask] for tap in output.taps)
        return BackboneOutput(output.embedding[mask], taps, output.last_hidden_state[mask], bounds)


def pool_packed(x: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str) -> torch.Tensor:
    """(T, D) packed -> (B, D) float32: the "mean" over tokens, the first ("cls") or the "last" one. None gives zeros.

    cu_seqlens: (B + 1,) bounds of the sequences.
    """
    bounds = cu_seqlens.to(x.device, torch.int64)
    lengths = bounds.diff()
    if pooling == "mean":
        sums = torch.segment_reduce(x.float(), "sum", lengths=lengths, initial=0, unsafe=True)
        return sums / lengths.clamp(min=1)[:, None]
    chosen = bounds[:-1] if pooling == "cls" else bounds[1:] - 1
    present = lengths > 0
    vectors = x.new_zeros((len(lengths), x.shape[1]), dtype=torch.float32)
    vectors[present] = x[chosen[present]].float()
    return vectors
