"""Class embeddings from prompts: names alone, with knowledge, and both blended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .encoding import Encode, embed
from .prompts import ClassPrompts

BLEND = 0.5  # without a dev set
_ROWS = 4096  # of the matrix of scores that exist at once
WEIGHTS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class ClassEmbeddings:
    """Two embeddings a class, (C, D) float32 with rows of length 1: from names alone, and with knowledge."""

    names: torch.Tensor
    knowledge: torch.Tensor

    def blend(self, weight: float = BLEND) -> torch.Tensor:
        """(C, D), rows of length 1: (1 - weight) of the names and weight of the knowledge.

        Raises ValueError for a weight outside [0, 1].
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: {weight!r} must be in [0, 1]: 0 is names alone, 1 knowledge alone")
        return F.normalize((1 - weight) * self.names + weight * self.knowledge, dim=1)

    def accuracy(self, images: torch.Tensor, labels: torch.Tensor, weight: float = BLEND) -> float:
        """The share of images, (N, D), whose nearest class is their label, (N,) int64."""
        classes = self.blend(weight).T
        parts = images.split(_ROWS)
        nearest = torch.cat([(part.float().to(classes.device) @ classes).argmax(dim=1) for part in parts])
        return float((nearest == labels.to(nearest.device)).double().mean())

    def choose_weight(
        self, images: torch.Tensor, labels: torch.Tensor, weights: Sequence[float] = WEIGHTS
    ) -> tuple[float, dict[float, float]]:
        """The weight of the blend that classifies a labelled dev set best, and the accuracy of each.

        images: (N, D) embeddings of any length; labels: (N,) int64. Of equally good weights the smallest is taken: what
        knowledge does not help, it should not touch. Raises ValueError for shapes that do not fit and labels out of
        range.
        """
        count, width = self.names.shape
        if images.ndim != 2 or images.shape[1] != width or labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"images, labels: shapes {tuple(images.shape)} and {tuple(labels.shape)}; must be (N, {width}) and "
                "(N,), N at least 1"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= count:
            raise ValueError(
                f"labels: from {int(labels.min())} to {int(labels.max())}; must be rows of the {count} classes"
            )
        found = {weight: self.accuracy(images, labels, weight) for weight in weights}
        return min(found, key=lambda weight: (-found[weight], weight)), found


def embed_classes(prompts: Sequence[ClassPrompts], encode: Encode) -> ClassEmbeddings:
    """Each class's mean over its templates; pieces of a definition are averaged first, texts normalised before it all.

    encode: list[str] -> (N, D). A class without a sense has the same embedding twice.
    Raises ValueError where there are no classes, and for what `encode` must not return.
    """
    if not prompts:
        raise ValueError("prompts: there are none; pass those of at least one class")
    names, knowledge = zip(*(_texts(prompt) for prompt in prompts), strict=True)
    flat = [text for groups in (*names, *knowledge) for group in groups for text in group]
    vectors = iter(embed(encode, flat))

    def mean(groups: Sequence[Sequence[str]]) -> torch.Tensor:
        of_templates = [torch.stack([next(vectors) for _ in group]).mean(dim=0) for group in groups]
        return F.normalize(torch.stack(of_templates).mean(dim=0), dim=0)

    return ClassEmbeddings(torch.stack(list(map(mean, names))), torch.stack(list(map(mean, knowledge))))


def _texts(prompt: ClassPrompts) -> tuple[list[tuple[str, ...]], tuple[tuple[str, ...], ...]]:
    """A class's texts in groups that are averaged: of names, and with knowledge."""
    return [(text,) for text in prompt.names], prompt.knowledge
