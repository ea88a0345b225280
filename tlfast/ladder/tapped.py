"""Which blocks of a backbone a ladder reads."""

from __future__ import annotations

from typing import Any

from ..backbone import FrozenBackbone, resolve_layers
from ..backbone.stack import Stack
from .config import LadderConfig


def tapped(backbone: FrozenBackbone, config: LadderConfig) -> FrozenBackbone:
    """The backbone with exactly the taps the ladder reads."""
    if not backbone.is_encoder_decoder:
        if config.decoder_layers is not None:
            raise ValueError(
                f"decoder_layers: this {backbone.model_type} backbone has one list of blocks; choose them by layers"
            )
        return backbone.with_taps(_wanted(backbone.stack, "layers", config.layers))
    decoder_layers = config.layers if config.decoder_layers is None else config.decoder_layers
    return backbone.with_taps(
        _wanted(backbone.stack, "decoder_layers", decoder_layers),
        _wanted(backbone.stacks["encoder"], "layers", config.layers),
    )


def _wanted(stack: Stack, argument: str, layers: Any) -> tuple[int, ...]:
    if layers == "all":
        return tuple(sorted(stack.taps))
    wanted = resolve_layers(argument, layers, len(stack.blocks))
    missing = [index for index in wanted if index not in stack.taps]
    if missing:
        raise ValueError(
            f"{argument}: blocks {missing} are not tapped; the backbone has taps {list(stack.taps)}. "
            'Freeze it with taps="all"'
        )
    return wanted
