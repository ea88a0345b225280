"""A stack: one list of equal blocks of a model, what its blocks look like, and which of them are tapped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .families import Family, StackTable, block_spec, config_value
from .generic import generic_blocks, generic_spec
from .parts import BlockParts, BlockSpec, find_submodule, submodule


@dataclass(frozen=True)
class Stack:
    """One list of blocks of a frozen model.

    name: "encoder", "decoder" or "blocks" (a model the table does not know). path: of the list, inside the model.
    parts: where a block keeps its pieces, None where that is not known. taps: indices of the tapped blocks.
    rotary: the model's rotary embedding, None for other positions. windows: how far each block's attention sees, in
    positions; None: any.
    """

    name: str
    path: str
    blocks: nn.ModuleList
    spec: BlockSpec
    taps: tuple[int, ...]
    parts: BlockParts | None = None
    final_norm: nn.Module | None = None
    rotary: nn.Module | None = None
    layer_types: tuple[str, ...] = ()
    windows: tuple[int | None, ...] = ()

    @property
    def measures_distance(self) -> bool:
        """Whether its attention depends on how far apart two tokens are."""
        return self.spec.positions == "relative" or any(window is not None for window in self.windows)

    def tapped(self, taps: tuple[int, ...]) -> Stack:
        """The same stack, tapped at other blocks."""
        return replace(self, taps=taps)

    def inverse_frequencies(self, index: int) -> torch.Tensor | None:
        """(head_dim / 2,) frequencies by which block `index` rotates queries and keys; None where it does not."""
        if self.rotary is None:
            return None
        kind = self.layer_types[index] if self.layer_types else ""
        by_kind = getattr(self.rotary, f"{kind}_inv_freq", None)
        return by_kind if by_kind is not None else self.rotary.inv_freq  # type: ignore[return-value]


def find_stacks(model: Any, family: Family | None, blocks: str | None, taps: Any) -> dict[str, Stack]:
    """The stacks of a model by name, all of them tapped as `taps(name, count)` says.

    blocks: the path of the list, for a model the table does not know or to overrule it.
    """
    if family is None or blocks is not None:
        path, found = (blocks, _named(model, blocks)) if blocks is not None else generic_blocks(model)
        return {"blocks": Stack("blocks", path, found, generic_spec(model, found), taps("blocks", len(found)))}
    stacks: dict[str, Stack] = {}
    for name, table in family.stacks.items():
        try:
            path, found = find_submodule(model, table.blocks)
        except AttributeError:
            if name == "decoder" and stacks:  # T5EncoderModel: an encoder-decoder's encoder alone
                continue
            raise
        stacks[name] = _stack(model, family, name, table, path, found, taps(name, len(found)))
    return stacks


def _stack(
    model: Any, family: Family, name: str, table: StackTable, path: str, blocks: nn.ModuleList, taps: tuple[int, ...]
) -> Stack:
    final_norm = None
    if table.final_norm is not None:
        try:
            _, final_norm = find_submodule(model, table.final_norm)
        except AttributeError:
            final_norm = None  # OPT with post-norm blocks has none
    rotary = model.rotary_emb if family.positions == "rotary" else None
    layer_types = tuple(config_value(model.config, "layer_types", ()))
    return Stack(
        name,
        path,
        blocks,
        block_spec(model.config, family, table, blocks[0]),
        taps,
        table.parts,
        final_norm,
        rotary,
        layer_types,
        _windows(model.config, layer_types or ("sliding_attention",) * len(blocks), table.causal),
    )


def _windows(config: Any, layer_types: tuple[str, ...], causal: bool) -> tuple[int | None, ...]:
    """How far each block sees: in transformers a causal window counts the query itself, another one does not."""
    window = config_value(config, "sliding_window")
    farthest = window - 1 if window is not None and causal else window
    return tuple(farthest if kind == "sliding_attention" else None for kind in layer_types)


def _named(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = submodule(model, path)
    except AttributeError:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(
            f"blocks: {type(model).__name__} has no {path!r}; it has the lists {', '.join(lists) or 'none'}"
        ) from None
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise ValueError(f"blocks: {path!r} is a {type(found).__name__}; name an nn.ModuleList with at least one block")
    return found
