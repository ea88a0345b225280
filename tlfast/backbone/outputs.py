"""What a frozen forward takes and gives: token shapes, masks, padded and packed outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

Visit = Callable[[torch.Tensor], None]

_INPUTS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class BackboneOutput:
    """What one frozen forward gives: B batch, S sequence, D width.

    Padded (the default): (B, S, D) each, zeros at padding, cu_seqlens is None.
    Packed: (tokens, D) each, the sequences end to end without padding; cu_seqlens (B + 1,) int32 are their bounds.
    embedding is what the first block reads.
    """

    embedding: torch.Tensor
    taps: tuple[torch.Tensor, ...]
    last_hidden_state: torch.Tensor
    cu_seqlens: torch.Tensor | None = None

    def to(self, device: Any, non_blocking: bool = False) -> BackboneOutput:
        """The same on a device."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=non_blocking)

        bounds = None if self.cu_seqlens is None else move(self.cu_seqlens)
        return BackboneOutput(move(self.embedding), tuple(map(move, self.taps)), move(self.last_hidden_state), bounds)


@dataclass(frozen=True)
class EncoderDecoderOutput:
    """What one frozen forward of an encoder-decoder gives, for each of the two."""

    encoder: BackboneOutput
    decoder: BackboneOutput

    def to(self, device: Any, non_blocking: bool = False) -> EncoderDecoderOutput:
        """The same on a device."""
        return EncoderDecoderOutput(self.encoder.to(device, non_blocking), self.decoder.to(device, non_blocking))


def is_empty(inputs: dict[str, Any]) -> bool:
    """Whether there is no token or no image to run."""
    shape = token_shape(inputs) or tuple(inputs["pixel_values"].shape[:1] if "pixel_values" in inputs else ())
    return 0 in shape


def token_shape(inputs: dict[str, Any]) -> tuple[int, ...] | None:
    """(B, S) of a stack's inputs; None where they are not tokens."""
    return next((tuple(inputs[name].shape[:2]) for name in _INPUTS if inputs.get(name) is not None), None)


def last_hidden_state_of(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    last = getattr(output, "last_hidden_state", None)
    return output[0] if last is None else last


def check_mask(mask: torch.Tensor | None, shape: tuple[int, ...] | None, past: int, prefix: str) -> torch.Tensor | None:
    """(B, S) bool of the tokens given now."""
    if mask is None:
        return None
    if shape is None:
        raise ValueError("attention_mask: this model's inputs are not tokens, and all positions count; leave it out")
    expected = (shape[0], shape[1] + past)
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"{prefix}attention_mask: got {tuple(mask.shape)}; pass (B, S) = {expected}, nonzero where a token is"
        )
    return mask[:, past:].bool()


def finish(output: BackboneOutput, mask: torch.Tensor | None, packed: bool) -> BackboneOutput:
    """Without padding, or with zeros there.

    Zeros are written in place where the tensors belong to this call alone: the embedding can be the caller's own
    inputs_embeds.
    """
    if packed:
        return pack(output, mask)
    if mask is not None and not (mask.device.type == "cpu" and bool(mask.all())):
        padding = ~mask[..., None]
        for tensor in (*output.taps, output.last_hidden_state):
            tensor.masked_fill_(padding, 0)
        return replace(output, embedding=output.embedding.masked_fill(padding, 0))
    return output


def without_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, S, D) with zeros at padding; a copy where there is any, for the model may still read x."""
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
        return x
    return x.masked_fill(~mask[..., None], 0)


def pack(output: BackboneOutput, mask: torch.Tensor | None) -> BackboneOutput:
    embedding = output.embedding
    if mask is None:
        mask = torch.ones(embedding.shape[:2], dtype=torch.bool, device=embedding.device)
    bounds = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    bounds[1:] = mask.sum(dim=1).cumsum(dim=0)
    whole = int(bounds[-1]) == mask.numel()  # nothing to leave out, nothing to copy

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1) if whole else x[mask]

    return BackboneOutput(tokens(embedding), tuple(map(tokens, output.taps)), tokens(output.last_hidden_state), bounds)
