"""Text embeddings from whatever encodes texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

# list[str] -> (N, D), a tensor or anything torch.as_tensor takes
Encode = Callable[[list[str]], Any]


@torch.no_grad()
def embed(encode: Encode, texts: Sequence[str], argument: str = "encode") -> torch.Tensor:
    """(N, D) float32, rows of length 1; each different text is encoded once.

    Raises ValueError where `encode` returns another shape or what is not finite.
    """
    different = list(dict.fromkeys(texts))
    vectors = torch.as_tensor(encode(different)).float()
    if vectors.ndim != 2 or len(vectors) != len(different):
        raise ValueError(
            f"{argument}: returned shape {tuple(vectors.shape)} for {len(different)} texts; it must be "
            f"({len(different)}, D), a row for each text"
        )
    if not vectors.isfinite().all():
        row = int((~vectors.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{argument}: returned values that are not finite, first for {different[row]!r}")
    place = {text: row for row, text in enumerate(different)}
    return F.normalize(vectors, dim=1)[[place[text] for text in texts]]
