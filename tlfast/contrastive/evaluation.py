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
    ranks = torch.cat(
        [_ranks(part, classes, of) for part, of in zip(images.split(_ROWS), own.split(_ROWS), strict=True)]
    )
    return {**_hits(ranks), "n": len(images)}


def retrieve(images: torch.Tensor, texts: torch.Tensor) -> dict[str, dict[str, float | int]]:
    """{"image_to_text", "text_to_image"}, each as `classify`: whether row i of (N, D) finds row i of the other.

    Raises ValueError for shapes that do not fit and embeddings that are not finite.
    """
    if len(images) != len(texts):
        raise ValueError(f"texts: there are {len(texts)} for {len(images)} images; pass one for each")
    own = range(len(images))
    return {"image_to_text": classify(images, texts, own), "text_to_image": classify(texts, images, own)}


def _ranks(queries: torch.Tensor, answers: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """How many answers are as near as the right one, which is not counted."""
    scores = queries.float() @ answers.float().T
    return (scores >= scores.gather(1, own[:, None])).sum(dim=1) - 1


def _hits(ranks: torch.Tensor) -> dict[str, float | int]:
    return {"accuracy": float((ranks < 1).double().mean()), "top5": float((ranks < TOP).double().mean())}


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
