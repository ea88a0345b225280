"""Scores of embeddings: classification by the nearest class, and retrieval of each other's pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TOP = 5
_ROWS = 4096  # of the matrix of scores that exist at once


def classify(images: torch.Tensor, classes: torch.Tensor, labels: Sequence[int]) -> dict[str, float | int]:
    """{"accuracy", "top5", "n"} of images (N, D) whose nearest of the classes (C, D) should be their label.

    A class that is as near as the right one counts as nearer: classes that cannot be told apart earn nothing.
    Raises ValueError for shapes that do not fit, labels out of range, and embeddings that are not finite.
    """
    _check(images, classes)
    own = torch.as_tensor(labels, dtype=torch.int64)
    if own.shape != images.shape[:1] or int(own.min()) < 0 or int(own.max()) >= len(classes):
        raise ValueError(f"labels: must be {len(images)} rows of the {len(classes)} classes")
    return _hits(_ranks(images, classes, [(own, torch.arange(len(classes)))]))


def retrieve(
    images: torch.Tensor,
    texts: torch.Tensor,
    labels: Sequence[int] | None = None,
    same_image: Sequence[int] | None = None,
) -> dict[str, dict[str, float | int]]:
    """{"image_to_text", "text_to_image"}, each as `classify`: whether row i of (N, D) finds row i of the other.

    labels: rows with equal ones may be found for each other, as images with the same caption. same_image: likewise, of
    an image that is there with several captions; each of them counts.
    Raises ValueError for shapes that do not fit and embeddings that are not finite.
    """
    _check(images, texts)
    rows = range(len(images))
    keys = [torch.as_tensor(rows if given is None else given, dtype=torch.int64) for given in (labels, same_image)]
    for name, given in (("texts", texts), ("labels", keys[0]), ("same_image", keys[1])):
        if len(given) != len(images):
            raise ValueError(f"{name}: {len(given)} for {len(images)} images; pass one for each")
    pairs = [(key, key) for key in keys]
    return {
        "image_to_text": _hits(_ranks(images, texts, pairs)),
        "text_to_image": _hits(_ranks(texts, images, pairs)),
    }


def _ranks(
    queries: torch.Tensor, answers: torch.Tensor, keys: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """How many wrong answers are as near as the nearest right one, whose keys, (N,) and (C,), are equal in any pair."""
    ranks = []
    for start in range(0, len(queries), _ROWS):
        rows = slice(start, start + _ROWS)
        scores = queries[rows].float() @ answers.float().T
        right = torch.stack([own[rows, None] == labels for own, labels in keys]).any(dim=0)
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def _hits(ranks: torch.Tensor) -> dict[str, float | int]:
    hits = [float((ranks < top).double().mean()) for top in (1, TOP)]
    return {"accuracy": hits[0], "top5": hits[1], "n": len(ranks)}


def _check(images: torch.Tensor, classes: torch.Tensor) -> None:
    if images.ndim != 2 or classes.ndim != 2 or images.shape[1] != classes.shape[1] or not len(images):
        raise ValueError(
            f"images, classes: {tuple(images.shape)} and {tuple(classes.shape)}; must be (N, D), (C, D), N over 0"
        )
    for name, x in (("images", images), ("classes", classes)):
        if not x.isfinite().all():
            raise ValueError(
                f"{name}: embeddings have NaN or infinity, first in row {int((~x.isfinite()).any(1).int().argmax())}"
            )
