"""Which blocks of the full model are the adapter, which stay in the emulator, and what each is called."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any


def emulator_blocks(num_blocks: int, adapter: tuple[int, int] = (2, 2), keep: int = 8) -> list[int]:
    """Indices, in the full model, of the middle blocks that an emulator of `keep` blocks keeps.

    num_blocks: of the full model. adapter: how many of the first and of the last blocks are trained; the m blocks
    between them are the middle. Of these, number round(i (m - 1) / (keep - 1)) stays for i = 0 ... keep - 1, so that
    the first and the last of the middle do; keep = 1 keeps the first.
    Raises ValueError where an adapter leaves no middle, or the middle has fewer than `keep` blocks.
    Source: Xiao, Lin, Han, "Offsite-Tuning: Transfer Learning without Full Model", 2023 (arXiv 2302.04870), section 3.
    """
    first, last = check_adapter(num_blocks, adapter)
    middle = num_blocks - first - last
    keep = _whole_number("keep", keep)
    if not 1 <= keep <= middle:
        raise ValueError(
            f"keep: {keep} of the {middle} middle blocks (of {num_blocks}, with adapter=({first}, {last})) cannot be "
            f"kept; pass 1 to {middle}"
        )
    if keep == 1:
        return [first]
    return [first + round(i * (middle - 1) / (keep - 1)) for i in range(keep)]


def check_adapter(num_blocks: int, adapter: tuple[int, int]) -> tuple[int, int]:
    """The two sizes of an adapter. Raises ValueError where they are none, or leave no middle."""
    num_blocks = _whole_number("num_blocks", num_blocks)
    try:
        first, last = adapter
    except (TypeError, ValueError):
        raise ValueError(
            f"adapter: {adapter!r} is not allowed; pass how many of the first and of the last blocks, such as (2, 2)"
        ) from None
    first, last = _whole_number("adapter", first), _whole_number("adapter", last)
    if min(first, last) < 0 or first + last == 0:
        raise ValueError(f"adapter: ({first}, {last}) is not allowed; pass sizes of at least 0, one of them above 0")
    if first + last >= num_blocks:
        raise ValueError(
            f"adapter: ({first}, {last}) leaves no middle block of {num_blocks}; pass sizes whose sum is at most "
            f"{num_blocks - 1}"
        )
    return first, last


@dataclass(frozen=True)
class BlockMap:
    """How the blocks of an emulator stand for those of the full model.

    total: blocks of the full model. adapter: sizes of its first and last part. middle: indices, in the full model, of
    the middle blocks that the emulator has, ascending.
    """

    total: int
    adapter: tuple[int, int]
    middle: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Of every block of the emulator, its index in the full model."""
        first, last = self.adapter
        return (*range(first), *self.middle, *range(self.total - last, self.total))

    @property
    def middle_places(self) -> range:
        """Indices of the middle blocks in the emulator."""
        return range(self.adapter[0], self.adapter[0] + len(self.middle))

    def role(self, place: int, count: int) -> str | None:
        """What block `place` of a model with `count` blocks is called: "first.1", "last.0"; None for a middle one."""
        first, last = self.adapter
        if place < first:
            return f"first.{place}"
        return f"last.{place - (count - last)}" if place >= count - last else None

    def adapter_places(self, count: int) -> list[int]:
        """Indices of the adapter's blocks in a model with `count` blocks."""
        return [place for place in range(count) if self.role(place, count) is not None]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {"total": self.total, "adapter": list(self.adapter), "middle": list(self.middle)}


def _whole_number(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{argument}: {value!r} is not a whole number; pass an integer")
    return operator.index(value)
