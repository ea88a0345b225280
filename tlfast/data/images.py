"""Reader for images: a folder for each class, or one flat folder without classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Images:
    """The image files of a folder and their raw labels, the names of their folders (or None)."""

    path: Path
    files: list[Path]
    labels: list[str] | None
    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "folder"

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        """What an error about an image begins with."""
        return str(self.files[index])

    def select(self, indices: Iterable[int]) -> Images:
        """The images at `indices`, in that order."""
        chosen = list(indices)
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return Images(self.path, [self.files[i] for i in chosen], labels)


def read_image_classes(path: str | Path) -> Images:
    """The images of a folder that has a folder for each class and nothing else, by class and name.

    Hidden files are left out. Only the beginning of each file is read; `open_image` reads the rest when it is needed.
    Raises InputError for a missing folder, one without classes, a class without images, and whatever is no image.
    """
    path = Path(path)
    files: list[Path] = []
    labels: list[str] = []
    for folder in _entries(path):
        if not folder.is_dir():
            raise InputError(f"{folder}: lies beside the folders of the classes; move it into one or remove it")
        images = _images(folder)
        files += images
        labels += [folder.name] * len(images)
    if not files:
        raise InputError(f"{path}: there are no classes in it; make a folder for each class and put its images there")
    return Images(path, files, labels)


def read_images(path: str | Path) -> Images:
    """The images of a flat folder, by name; hidden files are left out.

    Raises InputError for a missing or empty folder and whatever in it is no image.
    """
    path = Path(path)
    _entries(path)
    return Images(path, _images(path), None)


def open_image(path: Path) -> Image:
    """The whole image, as RGB and turned the way its EXIF data say; InputError where it is broken."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
        raise InputError(f"{path}: the image is broken ({error}); replace or remove it") from error


def _entries(folder: Path) -> list[Path]:
    if not folder.exists():
        raise InputError(f"{folder}: there is no such folder; check the path")
    if not folder.is_dir():
        raise InputError(f"{folder}: this is a file; pass a folder of images")
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    files = _entries(folder)
    for file in files:
        if file.is_dir():
            raise InputError(f"{file}: is a folder among images; move its images up or remove it")
        if file.suffix.lower() not in SUFFIXES:
            raise InputError(f"{file}: is no image by its extension; remove it or convert it to {', '.join(SUFFIXES)}")
        check_header(file)
    if not files:
        raise InputError(f"{folder}: there are no images in it; add some or remove the folder")
    return files


def check_header(file: Path) -> None:
    """What is no image at all is found before training, without decoding every image for it."""
    from PIL import Image

    try:
        with Image.open(file):
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: the image is broken ({error}); replace or remove it") from error
