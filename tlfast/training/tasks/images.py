"""A class for every image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from ...data import (
    ImageDataset,
    Images,
    Labels,
    fit_classes,
    read_image_classes,
    read_images,
    split_stratified,
    stack_batch,
)
from ..evaluation import Collate, predict_logits
from ..scores import ClassScoring
from .base import LabelledTask, Predictions
from .text import class_rows


@dataclass(frozen=True)
class ImageTask(LabelledTask):
    """Classes of images, in a folder for each class."""

    name: ClassVar[str] = "image-classification"
    preprocessor_class: ClassVar[str] = "AutoImageProcessor"
    preprocessor_folder: ClassVar[str] = "image_processor"
    reads_folders: ClassVar[bool] = True

    @classmethod
    def of(cls, max_length: int, backbone: str) -> Self:
        """The task before it has seen data."""
        return cls(max_length, backbone)

    def fitted(self, train: Images) -> Self:
        """With the classes that the training data have."""
        return replace(self, labels=fit_classes(train))

    def settings(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def read(self, path: str | Path, labelled: bool) -> Images:
        """Read a folder of classes, or a flat folder of images."""
        return read_image_classes(path) if labelled else read_images(path)

    def dataset(self, records: Images, preprocessor: Any) -> ImageDataset:
        """Images that are opened as they are needed."""
        return ImageDataset(records.files, preprocessor, self._targets(records))

    def split(self, train: Images, seed: int) -> tuple[Images, Images]:
        """Stratified by class."""
        return split_stratified(train, self.known.encode(train), seed)

    def collate(self, preprocessor: Any) -> Collate:
        """Stacks pixels."""
        return stack_batch

    def scoring(self, preprocessor: Any) -> ClassScoring:
        """By accuracy."""
        return ClassScoring()

    def predict(self, model: Any, path: str | Path, preprocessor: Any) -> Predictions:
        """`file`, `prediction` and `probability` an image."""
        images = self.read(path, labelled=False)
        logits = predict_logits(model, self.dataset(images, preprocessor), self.collate(preprocessor))
        rows = class_rows(self.known.names, logits)
        return Predictions([{"file": file.name} | row for file, row in zip(images.files, rows, strict=True)], 0)

    @classmethod
    def from_saved(cls, saved: dict[str, Any]) -> Self:
        """From task.json."""
        return cls(saved["max_length"], saved["backbone"], Labels(tuple(saved["labels"]["names"])))

    def _targets(self, images: Images) -> list[int] | None:
        return None if images.labels is None else [int(target) for target in self.known.encode(images)]
