"""Embeddings and features of many texts and images from a dual encoder, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbone import most_tokens
from ..data import ImageDataset
from .dual import DualEncoder

BATCH = 64


class TextEncoder:
    """list[str] -> (N, dim) float32 on the CPU, rows of length 1: what a DualEncoder makes of texts.

    max_length: tokens of a text, special ones included; None: as many as tokenizer and model take. What is longer loses
    its end.
    """

    def __init__(
        self, model: DualEncoder, tokenizer: Any, max_length: int | None = None, batch_size: int = BATCH
    ) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = max_length or most_tokens(model.text.body.config, tokenizer)

    def inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """What the text tower reads of some texts: padded as it was trained."""
        padding = "max_length" if self.model.text.body.pads else True
        return dict(
            self.tokenizer(
                list(texts), padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        )

    @torch.no_grad()
    def features(self, texts: Sequence[str], progress: Callable[[int], Any] = lambda count: None) -> torch.Tensor:
        """(N, width) float32 on the CPU, before the head. progress: called with how many more are done."""
        parts = []
        with self.model.evaluating():
            for start in range(0, len(texts), self.batch_size):
                part = texts[start : start + self.batch_size]
                parts.append(self.model.text.features(**self.inputs(part)).cpu())
                progress(len(part))
        return torch.cat(parts)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        with self.model.evaluating():
            return self.model.encode_text(features=self.features(texts)).cpu()


@torch.no_grad()
def image_features(
    model: DualEncoder,
    files: Sequence[Path],
    processor: Any,
    batch_size: int = BATCH,
    progress: Callable[[int], Any] = lambda count: None,
) -> torch.Tensor:
    """(N, width) float32 on the CPU, before the head, of image files. processor: a transformers image processor.

    progress: called with how many more are done.
    Raises InputError for a broken image, ValueError, naming the file, for features that are not finite.
    """
    dataset = ImageDataset(files, processor)
    parts = []
    with model.evaluating():
        for start in range(0, len(files), batch_size):
            items = [dataset[i] for i in range(start, min(start + batch_size, len(files)))]
            found = model.image.features(pixel_values=torch.stack([item["pixel_values"] for item in items])).cpu()
            if not found.isfinite().all():
                row = int((~found.isfinite().all(dim=1)).nonzero()[0])
                raise ValueError(
                    f"{files[start + row]}: the image tower makes NaN or infinity of it; check its weights"
                )
            parts.append(found)
            progress(len(items))
    return torch.cat(parts)


def embed_images(
    model: DualEncoder,
    files: Sequence[Path],
    processor: Any,
    batch_size: int = BATCH,
    progress: Callable[[int], Any] = lambda count: None,
) -> torch.Tensor:
    """(N, dim) float32 on the CPU, rows of length 1. Arguments and errors: as of `image_features`."""
    found = image_features(model, files, processor, batch_size, progress)
    with torch.no_grad(), model.evaluating():
        return model.encode_image(features=found).cpu()
