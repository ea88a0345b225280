"""LadderBank: many ladders on one frozen backbone, which runs once for all of them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backbone import BackboneOutput, EncoderDecoderOutput, FrozenBackbone, freeze
from .model import LadderModel
from .outputs import model_output
from .stacked import LadderStack, SideShape

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

_INPUTS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "pixel_values",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
}
_KEPT_STACKS = 8  # choices of ladders whose stacked weights are kept


class LadderBank(Mapping[str, LadderModel]):
    """Ladders by name on one frozen backbone, to serve many tasks; each gives what it gives alone.

    ladders: {name: LadderModel on this backbone's weights, or the folder of a saved one}; more by `add`. backbone: a
        FrozenBackbone or a transformers model, which is frozen then; its taps do not matter.
    bank(names=[...], **inputs): transformers' inputs, no labels; names: which ladders run, None for all. Returns {name:
        ModelOutput with logits}. No graph is built and nothing drops out, whatever mode the ladders are in.
    Ladders of the same side shape and layers are computed as one batch; their weights are then copied, and copied again
    when they are seen to have been trained or loaded in place. A ladder whose parameters were exchanged for others
    (load_state_dict with assign=True) must be removed and added. The others, and all with side_precision "bf16" or
    under autocast, run one by one.
    A mapping from names to ladders: bank[name].generate(...) is that ladder's own.
    Raises ValueError for no ladder, an unknown or repeated name, a ladder of another backbone or device or one whose
    starting weights are not set yet, and what from_pretrained raises; TypeError for anything else than a ladder.
    """

    def __init__(self, ladders: Mapping[str, LadderModel | str | Path], backbone: FrozenBackbone | nn.Module) -> None:
        if not isinstance(ladders, Mapping):
            raise TypeError(f"ladders: got a {type(ladders).__name__}; pass {{name: LadderModel or folder}}")
        if not ladders:
            raise ValueError("ladders: got none; pass at least one, {name: LadderModel or folder}")
        frozen = backbone if isinstance(backbone, FrozenBackbone) else freeze(backbone)
        self.backbone = _tapped(frozen, [])
        self._ladders: dict[str, LadderModel] = {}
        self._shapes: dict[str, SideShape | None] = {}
        self._stacks: OrderedDict[tuple[str, ...], LadderStack] = OrderedDict()
        for name, ladder in ladders.items():
            self.add(name, ladder)

    def __getitem__(self, name: str) -> LadderModel:
        return self._ladders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ladders)

    def __len__(self) -> int:
        return len(self._ladders)

    def __repr__(self) -> str:
        tasks = ", ".join(f"{name!r}: {ladder.task}" for name, ladder in self.items())
        return f"LadderBank({{{tasks}}}, {self.backbone.extra_repr()})"

    def add(self, name: str, ladder: LadderModel | str | Path) -> None:
        """Take in one more ladder, or a saved one from its folder."""
        if not isinstance(name, str):
            raise TypeError(f"name: got {name!r}; pass a string")
        if name in self:
            raise ValueError(f"name: {name!r} is in the bank already; remove it first, or choose another")
        self._ladders[name] = self._checked(name, ladder)
        self._shapes[name] = SideShape.of(self._ladders[name])
        self._changed()

    def remove(self, name: str) -> LadderModel:
        """Take a ladder out, and return it."""
        self._known([name])
        del self._shapes[name]
        ladder = self._ladders.pop(name)
        self._changed()
        return ladder

    def __call__(self, names: Sequence[str] | None = None, **inputs: Any) -> dict[str, ModelOutput]:
        chosen = list(self) if names is None else self._known(names)
        if not chosen:
            raise ValueError("names: no ladder to run; name at least one, or add one to the bank")
        inputs = _checked_inputs(inputs)
        with torch.no_grad():
            output = self.backbone(**inputs)
            logits = self._logits(chosen, output, inputs)
        return {name: model_output(self[name].task, None, logits[name], None) for name in chosen}

    def _checked(self, name: str, ladder: Any) -> LadderModel:
        if isinstance(ladder, str | Path):
            self.backbone.fingerprint()  # kept here, or every loading would compute it again
            try:
                ladder = LadderModel.from_pretrained(ladder, self.backbone)
            except ValueError as error:
                raise ValueError(f"ladder {name!r}: {error}") from error
        if not isinstance(ladder, LadderModel):
            raise TypeError(
                f"ladder {name!r}: got a {type(ladder).__name__}; pass a LadderModel or a saved one's folder"
            )
        own = ladder.backbone
        if own.model is not self.backbone.model and own.fingerprint() != self.backbone.fingerprint():
            raise ValueError(
                f"ladder {name!r}: it stands on another backbone ({own.name or own.model_type}) than the bank's "
                f"({self.backbone.name or self.backbone.model_type}); train it on this one"
            )
        if own.precision != self.backbone.precision:
            raise ValueError(
                f"ladder {name!r}: it stands on taps in {own.precision} and the bank on {self.backbone.precision}; "
                f"make the bank on freeze(model, precision={own.precision!r})"
            )
        places = [next(model.parameters()).device for model in (ladder.side, self.backbone)]
        if places[0] != places[1]:
            raise ValueError(
                f"ladder {name!r}: it is on {places[0]} and the backbone on {places[1]}; move it with to()"
            )
        if not ladder.calibrated:
            raise ValueError(
                f"ladder {name!r}: its starting weights are not set, for it has seen no batch; train or load it first"
            )
        return ladder

    def _known(self, names: Sequence[str]) -> list[str]:
        if isinstance(names, str):
            raise TypeError(f"names: got the string {names!r}; pass a list of names")
        unknown = [name for name in names if name not in self]
        if unknown:
            raise ValueError(f"names: {unknown[0]!r} is not in the bank; it has {', '.join(map(repr, self)) or 'none'}")
        if len(set(names)) < len(names):
            raise ValueError(f"names: {list(names)} names a ladder twice; name each once")
        return list(names)

    def _changed(self) -> None:
        self._stacks.clear()
        self.backbone = _tapped(self.backbone, list(self.values()))

    def _logits(self, chosen: list[str], output: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        groups: dict[Any, list[str]] = {}
        autocast = torch.is_autocast_enabled(next(self.backbone.parameters()).device.type)
        for name in chosen:
            rounded = autocast or self[name].ladder_config.side_precision == "bf16"
            shape = None if rounded else self._shapes[name]
            groups.setdefault(name if shape is None else shape, []).append(name)
        logits: dict[str, torch.Tensor] = {}
        for members in groups.values():
            seen = self._seen_by(self[members[0]], output)
            if len(members) == 1:
                logits[members[0]] = _climb(self[members[0]], seen, inputs)
            else:
                logits.update(zip(members, self._stack(tuple(members))(seen, mask, positions), strict=True))
        return logits

    def _seen_by(self, ladder: LadderModel, output: Any) -> Any:
        """The backbone's output with the ladder's taps alone."""
        if not isinstance(output, EncoderDecoderOutput):
            return _selected(output, self.backbone.tap_indices, ladder.backbone.tap_indices)
        parts = {
            name: _selected(getattr(output, name), stack.taps, ladder.backbone.stacks[name].taps)
            for name, stack in self.backbone.stacks.items()
        }
        return EncoderDecoderOutput(**parts)

    def _stack(self, members: tuple[str, ...]) -> LadderStack:
        stack = self._stacks.pop(members, None)
        if stack is None or not stack.is_current():
            stack = LadderStack([self[name] for name in members])
        self._stacks[members] = stack  # the latest at the end
        if len(self._stacks) > _KEPT_STACKS:
            self._stacks.popitem(last=False)
        return stack


def _tapped(backbone: FrozenBackbone, ladders: Sequence[LadderModel]) -> FrozenBackbone:
    """The backbone with the taps that any of the ladders reads."""

    def union(name: str) -> list[int]:
        return sorted({index for ladder in ladders for index in ladder.backbone.stacks[name].taps})

    encoder = union("encoder") if backbone.is_encoder_decoder else None
    return backbone.with_taps(union(backbone.stack.name), encoder)


def _selected(output: BackboneOutput, taps: Sequence[int], wanted: Sequence[int]) -> BackboneOutput:
    return dataclasses.replace(output, taps=tuple(output.taps[taps.index(index)] for index in wanted))


def _climb(ladder: LadderModel, output: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Its logits in eval mode; the mode it was in is left as it was."""
    training = ladder.training
    if training:
        ladder.eval()
    try:
        masks = {name: inputs.get(name) for name in ("attention_mask", "decoder_attention_mask", "position_ids")}
        return ladder.climb(output, **masks)
    finally:
        if training:
            ladder.train()


def _checked_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are given; TypeError for what a bank does not take."""
    given = {name: value for name, value in inputs.items() if value is not None}
    if "labels" in given:
        raise TypeError("labels: a bank computes no loss; call bank[name](..., labels=labels)")
    unknown = sorted(given.keys() - _INPUTS)
    if unknown:
        raise TypeError(f"{unknown[0]}: a bank has no such input; it takes {', '.join(sorted(_INPUTS))}")
    return given
