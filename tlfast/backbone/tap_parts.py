"""What of a frozen forward a tap cache holds, and the forms in which its numbers are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

from ..ops.quantise_rows import quantise_rows
from .outputs import BackboneOutput, EncoderDecoderOutput
from .tensor_file import dtype_name

Output = BackboneOutput | EncoderDecoderOutput
Slots = dict[str, torch.Tensor]  # "embedding", "tap.0" ..., and "last" where the last tap is not that already
ONLY, ENCODER, DECODER = "backbone", "encoder", "decoder"  # stacks: the only one of a model, or the two that it has


@dataclass(frozen=True)
class Part:
    """Slots of one stack that are as wide and of the same dtype: they lie behind each other in a file."""

    name: str
    stack: str
    slots: tuple[str, ...]
    width: int
    dtype: torch.dtype

    def describe(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {"slots": list(self.slots), "dtype": dtype_name(self.dtype)}


class Column(NamedTuple):
    """One tensor of a stored part: its name behind the part's, its dtype, and the shape of what a row has in it."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """What a row takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Storage(Protocol):
    """How rows are stored: (rows, width) to one tensor a column, and back from any (..., width)."""

    name: str

    def columns(self, part: Part) -> tuple[Column, ...]:
        """What is stored of a part."""

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One tensor a column."""

    def decode(self, columns: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The rows, in the part's dtype."""


class Exact:
    """As the backbone gives them."""

    name = "exact"

    def columns(self, part: Part) -> tuple[Column, ...]:
        """The numbers."""
        return (Column("", part.dtype, (part.width,)),)

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As they are."""
        return (rows,)

    def decode(self, columns: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """As they were."""
        return columns[0]


class Int8:
    """In 8 bits, with a scale for each token and slot: the largest error is 1/254 of the token's largest number."""

    name = "int8"

    def columns(self, part: Part) -> tuple[Column, ...]:
        """The numbers and their scales."""
        return Column("", torch.int8, (part.width,)), Column(".scale", torch.float32, ())

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ops.quantise_rows."""
        return quantise_rows(rows)

    def decode(self, columns: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """values * scale."""
        values, scale = columns
        return values.to(torch.float32).mul_(scale[..., None]).to(dtype)


STORAGES: dict[str, Storage] = {storage.name: storage for storage in (Exact(), Int8())}


def slots_of(output: Output) -> dict[str, Slots]:
    """What a forward gave, by stack and slot."""
    if isinstance(output, EncoderDecoderOutput):
        return {ENCODER: _slots(output.encoder), DECODER: _slots(output.decoder)}
    return {ONLY: _slots(output)}


def output_of(stacks: Mapping[str, Slots]) -> Output:
    """A forward's output again, from what `parts_of` has chosen of it."""
    made = {stack: _output(slots) for stack, slots in stacks.items()}
    return EncoderDecoderOutput(**made) if len(made) == 2 else made[ONLY]


def parts_of(stacks: Mapping[str, Slots]) -> tuple[Part, ...]:
    """The parts of a forward's output, from one that was run; a last hidden state that is the last tap is left out."""
    return tuple(part for stack, slots in stacks.items() for part in _parts(stack, slots))


def _parts(stack: str, slots: Slots) -> Iterator[Part]:
    last, tap = slots["last"], slots.get(f"tap.{len(slots) - 3}")
    repeated = tap is not None and last.dtype == tap.dtype and torch.equal(last, tap)
    groups: dict[tuple[int, torch.dtype], list[str]] = {}
    for name, tensor in slots.items():
        if not (name == "last" and repeated):
            groups.setdefault((tensor.shape[-1], tensor.dtype), []).append(name)
    for number, ((width, dtype), names) in enumerate(groups.items()):
        yield Part(f"{stack}.{number}", stack, tuple(names), width, dtype)


def _slots(output: BackboneOutput) -> Slots:
    taps = {f"tap.{number}": tap for number, tap in enumerate(output.taps)}
    return {"embedding": output.embedding, **taps, "last": output.last_hidden_state}


def _output(slots: Slots) -> BackboneOutput:
    taps = tuple(slots[f"tap.{number}"] for number in range(sum(name.startswith("tap.") for name in slots)))
    return BackboneOutput(slots["embedding"], taps, slots["last"] if "last" in slots else taps[-1])
