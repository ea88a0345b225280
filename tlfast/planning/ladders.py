"""Rows of ladders: every tap storage on a backbone in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..backbone.parts import BlockSpec
from ..backbone.stack import Stack
from ..ladder import LadderConfig
from ..ladder.heads import ClassifierHead, LanguageHead
from ..ladder.side_network import SideNetwork
from . import terms, work
from .outline import CLASSIFICATION, Outline
from .row import Row

FLOAT, ADAMW = 4, 8  # bytes a trained number: it or its gradient, and the optimizer's two moments of it


@dataclass(frozen=True)
class _Side:
    """The side network of one stack."""

    stack: Stack
    network: SideNetwork
    tokens: int
    keys: int
    memory_tokens: int

    @property
    def rungs(self) -> int:
        return len(self.stack.taps)

    @property
    def spec(self) -> BlockSpec:
        """The shape of its blocks."""
        block: Any = self.network.blocks[0]
        return block.spec


def ladder_rows(
    outline: Outline,
    config: LadderConfig,
    precisions: Sequence[str],
    storages: Sequence[str] = terms.STORAGES,
    averaged: bool = False,
) -> list[Row]:
    """A row for each precision of the backbone and each way to keep taps, with the other settings of `config`.

    Trained by AdamW in float32; averaged: with averages of the weights, which count as the optimizer's. Raises
    ValueError for a reduction that does not divide a block, and where "project" is asked for with a tap_dim above the
    width of a tap.
    """
    narrowest = min(stack.spec.width for stack in outline.stacks.values())
    if "project" in storages and config.tap_dim > narrowest:
        raise ValueError(
            f"tap_dim: {config.tap_dim} is more than the {narrowest} channels of a tap; pass at most {narrowest}, or "
            "leave 'project' out of the storages"
        )
    with outline.mode:
        sides = _sides(outline, config)
        head = _head(outline, config, sides[-1].network.width)
    trained = sum(p.numel() for side in sides for p in side.network.parameters())
    trained += sum(p.numel() for p in head.parameters())
    rows = []
    for precision in precisions:
        frozen = outline.frozen_bytes(precision)
        rows += [_row(outline, config, sides, frozen, trained, precision, storage, averaged) for storage in storages]
    return rows


def _sides(outline: Outline, config: LadderConfig) -> list[_Side]:
    sides: list[_Side] = []
    for stack in outline.stacks.values():
        tokens, memory = outline.tokens(stack), sides[0] if stack.spec.cross else None
        keys = tokens // outline.job.batch
        width, memory_tokens = (memory.network.width, memory.tokens) if memory is not None else (None, 0)
        network = SideNetwork(stack, config, width)
        sides.append(_Side(stack, network, tokens, keys, memory_tokens))
    return sides


def _head(outline: Outline, config: LadderConfig, side_width: int) -> Any:
    if outline.job.task not in CLASSIFICATION:
        return LanguageHead(outline.output_width, side_width, config)
    return ClassifierHead(outline.output_width, side_width, outline.job.labels, config, 0.0)


def _row(
    outline: Outline,
    config: LadderConfig,
    sides: list[_Side],
    frozen: int,
    trained: int,
    precision: str,
    storage: str,
    averaged: bool,
) -> Row:
    saved = sum(_saved(outline, side, config, precision, storage) for side in sides) + _head_saved(outline, precision)
    basis = 0
    if storage == "project":  # what reads a tap is narrower, and a fixed basis is before it
        for side in sides:
            width, dim, places = side.stack.spec.width, config.tap_dim, side.rungs + 1
            trained -= places * side.network.width * (width - dim)
            basis += places * FLOAT * width * dim
    optimizer, gradients = (ADAMW + FLOAT * averaged) * trained, FLOAT * trained
    forward, backward = _forward_room(outline, precision), _backward_room(sides, storage)
    work_done, cached = _forwards(outline, sides, storage)
    return Row(
        method=f"ladder r={config.reduction}",
        setting={"precision": precision, "tap_storage": storage},
        trained=trained,
        weights=frozen + basis + FLOAT * trained,
        saved=saved,
        gradients=gradients,
        optimizer=optimizer,
        peak=optimizer + saved + max(forward, gradients + backward),
        forwards=work_done,
        host=sum(_on_host(outline, side, precision, storage) for side in sides),
        cache_sample=_cache(outline, sides, config, precision, storage),
        cached_forwards=cached,
    )


def _saved(outline: Outline, side: _Side, config: LadderConfig, precision: str, storage: str) -> int:
    spec, tokens = side.spec, side.tokens
    itemsize = 2 if config.side_precision == "bf16" else outline.tap_itemsize(side.stack, precision)
    taps = (side.rungs + 1) * terms.tap(storage, tokens, side.stack.spec.width, itemsize, config.tap_dim)
    rungs = side.rungs * (terms.rung(spec, storage, tokens) + terms.block(spec, tokens))
    return taps + rungs + terms.relative_bias(spec, side.keys) + terms.end(spec, tokens, _reads_tokens(outline, side))


def _reads_tokens(outline: Outline, side: _Side) -> bool:
    """Whether a decoder or the head reads the side network's every token, and not their mean."""
    return side.stack is not outline.last or outline.job.task not in ("sequence-classification", "image-classification")


def _on_host(outline: Outline, side: _Side, precision: str, storage: str) -> int:
    itemsize = outline.tap_itemsize(side.stack, precision)
    return (side.rungs + 1) * terms.on_host(storage, side.tokens, side.stack.spec.width, itemsize)


def _head_saved(outline: Outline, precision: str) -> int:
    job, width = outline.job, outline.output_width
    tokens = outline.tokens(outline.last)
    if job.task not in CLASSIFICATION:
        return terms.language_head(tokens, width, outline.tap_itemsize(outline.last, precision))
    return terms.classifier(tokens if job.task == "token-classification" else job.batch, width)


def _forward_room(outline: Outline, precision: str) -> int:
    """The most that one block of the backbone, or the language-model head, takes for itself in the forward."""
    most = terms.logits_at_once(outline.tokens(outline.last), outline.output_width, outline.vocabulary)
    for stack in outline.stacks.values():
        spec = stack.spec
        inside = max(2 * spec.hidden if spec.gated else spec.hidden, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
        most = max(most, outline.tokens(stack) * (inside + 2 * spec.width) * outline.tap_itemsize(stack, precision))
    return most


def _backward_room(sides: list[_Side], storage: str) -> int:
    """The most that one side block takes in the backward, and what waits for a second forward."""
    most = 0
    for side in sides:
        spec = side.spec
        inside = terms.inside_block(spec, side.tokens)
        if spec.cross:
            inside += terms.inside_crossing(spec, side.tokens, side.memory_tokens)
        most = max(most, inside + side.rungs * terms.waiting(spec, storage, side.tokens))
    return most


def _cache(outline: Outline, sides: list[_Side], config: LadderConfig, precision: str, storage: str) -> int:
    """A sample on disk: of each stack the embedding, the taps, and the last hidden state where no tap is that."""
    kept = storage if storage in ("int8", "project") else "keep"
    total = 0
    for side in sides:
        stack, itemsize = side.stack, outline.tap_itemsize(side.stack, precision)
        total += (side.rungs + 1) * terms.tap(kept, side.tokens, stack.spec.width, itemsize, config.tap_dim)
        if stack.final_norm is not None or stack.taps[-1] != len(stack.blocks) - 1:
            whole = "int8" if kept == "int8" else "keep"
            width = outline.output_width if side is sides[-1] else stack.spec.width
            total += terms.tap(whole, side.tokens, width, itemsize, config.tap_dim)
    return total // outline.job.batch


def _forwards(outline: Outline, sides: list[_Side], storage: str) -> tuple[float, float]:
    """A step in frozen forwards; and where the cache has the taps."""
    blocks, head = work.frozen_blocks(outline), work.head(outline)
    own = head  # the gradient of what the head reads
    for side in sides:
        spec, width = side.spec, side.stack.spec.width
        # forward, recomputed in the backward, and a backward of twice that
        own += 4 * work.side(side.network, spec, side.tokens, side.keys)
        own += 2 * work.rungs(side.rungs, side.tokens, width, spec.width)
    again = blocks if storage == "stream" else 0
    return (blocks + head + own + again) / (blocks + head), (head + own) / (blocks + head)
