"""The tokens a part at a time: what the implementations that never hold all logits share."""

from __future__ import annotations

from collections.abc import Iterator


def parts(size: int, step: int) -> Iterator[slice]:
    """Slices that cover range(size)."""
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))
