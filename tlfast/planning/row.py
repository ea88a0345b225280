"""One line of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What one way to train takes. Bytes are of the device that computes, for the whole batch; weights apart from rest.

    setting: what makes it this row, such as precision, tap storage and reduction. weights: frozen and trained.
    saved: for the backward pass, and the result. peak: the most of a step beyond the weights, optimizer included.
    host: taps in host memory. cache_sample: on disk, None where nothing can be cached. forwards: floating-point
    operations of a step in frozen forwards of the same model (cached: of one whose taps come from the cache).
    """

    method: str
    setting: dict[str, Any]
    trained: int
    weights: int
    saved: int
    gradients: int
    optimizer: int
    peak: int
    forwards: float
    host: int = 0
    cache_sample: int | None = None
    cached_forwards: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)
