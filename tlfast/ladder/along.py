"""A forward in which the side network climbs while the backbone runs: no more than one tap is at hand at a time.

On a GPU the two run side by side, on a stream each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..backbone import FrozenBackbone
from ..backbone.sharding import spread_after_use
from .side_network import Climb, SideNetwork
from .side_stream import Beside
from .stream import Stream

if TYPE_CHECKING:
    from .model import LadderModel

Inputs = dict[str, Any]


def states_along(model: LadderModel, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head reads: the side network's output and the backbone's last hidden state.

    The taps are kept for the backward pass as the side networks' tap storage says.
    """
    backbone, encoder_side = model.backbone, model.side_encoder
    sides = [model.side] if encoder_side is None else [encoder_side, model.side]
    storage = _stream(backbone, sides, inputs) if model.ladder_config.tap_storage == "stream" else None
    mask = _bool(inputs.get("attention_mask"))
    if encoder_side is None:
        climb = Beside(Climb(model.side, mask, inputs.get("position_ids"), storage=storage))
        output = backbone(visit=climb, **inputs)
        return climb.end(), output.last_hidden_state
    climb = Beside(Climb(encoder_side, mask, storage=storage))
    of_encoder, of_decoder = _halves(inputs)
    last = backbone.encode(visit=climb, **of_encoder).last_hidden_state
    decoder_mask = _bool(inputs.get("decoder_attention_mask"))
    climb = Beside(Climb(model.side, decoder_mask, memory=climb.end(), memory_mask=mask, storage=storage))
    output = backbone.decode(last, inputs.get("attention_mask"), visit=climb, **of_decoder)
    return climb.end(), output.last_hidden_state


def _stream(backbone: FrozenBackbone, sides: list[SideNetwork], inputs: Inputs) -> Stream:
    def run(inputs: Inputs, visit: Callable[[torch.Tensor], None]) -> None:
        with spread_after_use(backbone.model.modules()):
            if not backbone.is_encoder_decoder:
                backbone(visit=visit, **inputs)
                return
            of_encoder, of_decoder = _halves(inputs)
            last = backbone.encode(visit=visit, **of_encoder).last_hidden_state
            backbone.decode(last, inputs.get("attention_mask"), visit=visit, **of_decoder)

    modules: list[Any] = [module for side in sides for module in (side.embedding, *side.rungs)]
    return Stream(modules, inputs, run)


def _halves(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """The encoder's inputs and the decoder's."""
    of_decoder = {name: value for name, value in inputs.items() if name.startswith("decoder_")}
    return {name: value for name, value in inputs.items() if name not in of_decoder}, of_decoder


def _bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.bool()
