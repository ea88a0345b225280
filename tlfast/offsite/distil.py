"""Distillation: the emulator's middle learns to give what the full model's middle gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize

from .architecture import find_blocks
from .block_map import BlockMap
from .encoding import Encoded

_WARMUP = 0.05
_LARGEST_NORM = 1.0
_NAMES = ("steps", "learning_rate", "kd_weight", "lm_weight", "seed")


class Batches(Protocol):
    """A list of batches, or what makes them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Distillation:
    """How a middle is distilled.

    batches: of the model's inputs, without labels; they are gone through in order, again and again. steps: of AdamW.
    kd_weight, lm_weight: of matching the middle and, where the model is a causal language model, of predicting the next
        token; the paper has 30 and 1 for language models, and no second loss for images. seed: recorded with the rest.
    Raises ValueError for a setting out of range.
    """

    batches: Batches
    steps: int = 1000
    learning_rate: float = 3e-4
    kd_weight: float = 30.0
    lm_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not len(self.batches):
            raise ValueError("batches: there is none; distillation needs at least one batch of inputs")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps: {self.steps!r} is not allowed; pass at least 1")
        for name in ("learning_rate", "kd_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not allowed; pass a finite number above 0")
        if not 0 <= self.lm_weight < math.inf:
            raise ValueError(f"lm_weight: {self.lm_weight!r} is not allowed; pass a finite number of at least 0")

    def to_dict(self) -> dict[str, float]:
        """As the manifest keeps it: nothing of the data."""
        return {name: getattr(self, name) for name in _NAMES}


def distil(
    model: Any,
    emulator: Any,
    blocks: BlockMap,
    encoded: Mapping[str, Encoded],
    settings: Distillation,
    progress: Callable[[float], Any] = lambda loss: None,
) -> dict[str, Encoded]:
    """Train the emulator's middle in place, against the full model's; the new parts of what is stored in parts.

    loss = kd_weight mean(((t - s) / rms(t))^2) + lm_weight (next-token loss), where t is what the full middle gives for
    the emulator's own input and s what the emulator's gives, both over the tokens that are no padding. Dropout is off.
    Low-rank matrices keep their rank and pruned channels stay zero. progress is called with each step's loss.
    Raises ValueError for a middle in fewer bits, and FloatingPointError where the loss stops being finite.
    Source: Xiao, Lin, Han 2023 (arXiv 2302.04870), section 3.2, and its code for the weights.
    """
    if any(value.kind != "low-rank" for value in encoded.values()):
        raise ValueError(
            "distillation: int8 and nf4 weights cannot be trained; leave it out, or use svd, prune or keep"
        )
    path_blocks = find_blocks(emulator).blocks
    middle = nn.ModuleList([path_blocks[place] for place in blocks.middle_places])
    writes_text = settings.lm_weight > 0 and emulator.can_generate() and not emulator.config.is_encoder_decoder
    emulator.requires_grad_(False)
    middle.requires_grad_(True)

    def loss_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return _loss(model, emulator, blocks, inputs, settings, writes_text)

    with _low_rank(emulator, encoded) as factors, _zeros_kept(middle):
        for loss in descend(middle, settings, "distillation", loss_of):
            _put_zeros(middle)
            progress(loss)
        parts = {name: {part: x.detach().clone() for part, x in made.items()} for name, made in factors().items()}
    emulator.requires_grad_(True).eval()
    return {name: Encoded(value.kind, value.rank, value.columns, parts[name]) for name, value in encoded.items()}


def descend(
    part: nn.Module, settings: Distillation, what: str, loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor]
) -> Iterator[float]:
    """Train what of a part requires gradients, and give the loss after each step. loss_of: of a batch without labels.

    Raises FloatingPointError, which says of what, where the loss stops being finite.
    """
    optimizer = torch.optim.AdamW([p for p in part.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    for step in range(settings.steps):
        batch = settings.batches[step % len(settings.batches)]
        optimizer.param_groups[0]["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        loss = loss_of({name: tensor for name, tensor in batch.items() if name != "labels"})
        if not bool(loss.isfinite()):
            raise FloatingPointError(f"the loss of {what} is {loss.item()} at step {step}; use a lower rate")
        loss.backward()
        clip_grad_norm_(part.parameters(), _LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def mismatch(target: torch.Tensor, made: torch.Tensor, settings: Distillation) -> torch.Tensor:
    """kd_weight mean(((t - s) / rms(t))^2)."""
    return settings.kd_weight * ((target - made) / target.square().mean().sqrt()).square().mean()


def _loss(
    model: Any, emulator: Any, blocks: BlockMap, inputs: dict[str, torch.Tensor], settings: Distillation, text: bool
) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    labels = None
    if text:
        labels = inputs["input_ids"] if mask is None else inputs["input_ids"].masked_fill(mask == 0, -100)
    first = blocks.adapter[0]
    with torch.no_grad():
        target = real_tokens(run_to(model, blocks.total - blocks.adapter[1] - 1, inputs), mask)
    last = first + len(blocks.middle) - 1
    if text:
        with _output_of(emulator, last) as small:
            output = emulator(**inputs, labels=labels)
        made = real_tokens(small[0], mask)
    else:
        made = real_tokens(run_to(emulator, last, inputs), mask)
    loss = mismatch(target, made, settings)
    return loss + settings.lm_weight * output.loss if text else loss


def real_tokens(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The states of the tokens that are no padding."""
    return hidden if mask is None else hidden[mask.bool()]


@contextmanager
def _output_of(model: Any, place: int) -> Iterator[list[torch.Tensor]]:
    """A list that gets the output of one block when the model runs."""
    found: list[torch.Tensor] = []

    def keep(_block: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = find_blocks(model).blocks[place].register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


class _ReachedError(Exception):
    """Out of a forward whose rest nobody needs."""


def run_to(model: Any, place: int, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The output of one block, behind which the model is not run."""
    with _output_of(model, place) as found:
        handle = find_blocks(model).blocks[place].register_forward_hook(_stop)
        try:
            model(**inputs)
        except _ReachedError:
            pass
        finally:
            handle.remove()
    return found[0]


def _stop(_block: Any, _args: Any, _output: Any) -> None:
    raise _ReachedError


class _Product(nn.Module):
    """A weight as the product of two factors."""

    def __init__(self, encoded: Encoded) -> None:
        super().__init__()
        self.encoded = encoded

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right

    def right_inverse(self, _weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where training starts."""
        return self.encoded.parts["left"].clone(), self.encoded.parts["right"].clone()


@contextmanager
def _low_rank(emulator: nn.Module, encoded: Mapping[str, Encoded]) -> Iterator[Callable[[], dict[str, Any]]]:
    """Inside, the encoded weights are products of factors that are trained; gives what returns the factors."""
    owners = {name: emulator.get_submodule(name.removesuffix(".weight")) for name in encoded}
    for name, module in owners.items():
        parametrize.register_parametrization(module, "weight", _Product(encoded[name]), unsafe=True)

    def factors() -> dict[str, Any]:
        lists: dict[str, Any] = {name: module.parametrizations["weight"] for name, module in owners.items()}  # type: ignore
        return {name: {"left": x.original0, "right": x.original1} for name, x in lists.items()}

    try:
        yield factors
    finally:
        for module in owners.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


@contextmanager
def _zeros_kept(middle: nn.Module) -> Iterator[None]:
    """Inside, `_put_zeros` restores what is exactly zero now: pruned channels."""
    for parameter in middle.parameters():
        gone = parameter.detach() == 0
        parameter.pruned = gone if parameter.dim() == 2 and bool(gone.any()) else None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in middle.parameters():
            if hasattr(parameter, "pruned"):
                del parameter.pruned


@torch.no_grad()
def _put_zeros(middle: nn.Module) -> None:
    for parameter in middle.parameters():
        gone = getattr(parameter, "pruned", None)
        if gone is not None:
            parameter.masked_fill_(gone, 0)


def _schedule(step: int, steps: int) -> float:
    """A share of the learning rate: a short linear warmup, then a half cosine down to nothing."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
