"""Images as the pixels a backbone reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from .images import open_image


class ImageDataset(Dataset):
    """Images that are opened when they are asked for: item i has `pixel_values` and, with targets, `labels`.

    processor: a transformers image processor. Asking for a broken image raises InputError.
    """

    truncated = 0

    def __init__(self, files: Sequence[Path], processor: Any, targets: Sequence[int] | None = None) -> None:
        self.files = files
        self.processor = processor
        self.targets = targets
        self.lengths = [1] * len(files)

    def select(self, indices: Sequence[int]) -> ImageDataset:
        """The images at `indices`, in that order."""
        targets = None if self.targets is None else [self.targets[i] for i in indices]
        return ImageDataset([self.files[i] for i in indices], self.processor, targets)

    @property
    def labels(self) -> list[int]:
        """The targets; KeyError without them."""
        if self.targets is None:
            raise KeyError("labels")
        return list(self.targets)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.processor(images=open_image(self.files[index]), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels} | ({} if self.targets is None else {"labels": self.targets[index]})

    def beside_taps(self, index: int) -> dict[str, Any]:
        """What a model still reads of an image when the backbone's taps for it are at hand: its target."""
        return {} if self.targets is None else {"labels": self.targets[index]}

    def digest(self) -> str:
        """SHA-256 of the files' contents in their order and of the targets; reads every file."""
        digest = hashlib.sha256(repr(self.targets).encode())
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()
