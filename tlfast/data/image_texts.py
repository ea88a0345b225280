"""Reader for images with a class, a caption or both: folders of classes, or a file that names images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from .errors import InputError
from .images import SUFFIXES, Images, check_header, read_image_classes, read_images
from .read import check_columns, read_table


@dataclass(frozen=True)
class ImageTexts:
    """Images with their classes and captions; "" where a row has none. lines: in the file, or None for a folder."""

    path: Path
    files: list[Path]
    labels: list[str]
    captions: list[str]
    lines: list[int] | None = None
    unit: ClassVar[str] = "images"
    source: ClassVar[str] = "folder or file"

    def __len__(self) -> int:
        return len(self.files)

    @property
    def labelled(self) -> bool:
        """Whether every image has a class."""
        return all(self.labels)

    @property
    def same_file(self) -> list[Path]:
        """What rows of the same image have in common, however the file is written: its whole path."""
        return [file.resolve() for file in self.files]

    def where(self, index: int) -> str:
        """What an error about an image begins with."""
        return str(self.files[index]) if self.lines is None else f"{self.path}, line {self.lines[index]}"

    def select(self, indices: Iterable[int]) -> ImageTexts:
        """The images at `indices`, in that order."""
        chosen = list(indices)
        columns = ([column[i] for i in chosen] for column in (self.files, self.labels, self.captions))
        files, labels, captions = columns
        lines = None if self.lines is None else [self.lines[i] for i in chosen]
        return ImageTexts(self.path, files, labels, captions, lines)  # type: ignore[arg-type]


def read_image_texts(
    path: str | Path, image_column: str = "image", label_column: str = "label", caption_column: str = "caption"
) -> ImageTexts:
    """Images of a folder with a folder for each class, of a flat folder (without classes), or of a table.

    A table (.tsv, .csv, .jsonl) has the column `image`, a path from the table's folder or an absolute one, and `label`,
    `caption` or both; a row may leave one of them empty. What is no image at all is found here, by its beginning.
    Raises InputError, with the line or the file, for what the readers of folders and tables refuse, a missing column, a
    missing or broken image, and a row with neither a label nor a caption.
    """
    path = Path(path)
    if path.is_dir():
        images = _of_folder(path)
        blank = [""] * len(images)
        return ImageTexts(path, images.files, images.labels or blank, blank)
    if not path.exists():
        raise InputError(f"{path}: there is no such folder or file; check the path")
    columns, rows = read_table(path)
    check_columns(path, columns, [image_column])
    texts = [name for name in (label_column, caption_column) if name in columns]
    if not texts:
        raise InputError(
            f"{path}: there is no column {label_column!r} and no column {caption_column!r}; it has "
            f"{', '.join(map(repr, columns))}. Rename one or name the right one"
        )
    check_columns(path, columns, texts)
    files: list[Path] = []
    labels: list[str] = []
    captions: list[str] = []
    lines: list[int] = []
    for line, row in rows:
        lines.append(line)
        files.append(_image(path, line, row.get(image_column, "").strip()))
        labels.append(row.get(label_column, "").strip())
        captions.append(" ".join(row.get(caption_column, "").split()))
        if not labels[-1] and not captions[-1]:
            raise InputError(f"{path}, line {line}: has neither a label nor a caption; fill one or remove the row")
    if not lines:
        raise InputError(f"{path}: the file has a header and no rows; add data")
    return ImageTexts(path, files, labels, captions, lines)


def _of_folder(path: Path) -> Images:
    """By what lies in it: folders, or images alone."""
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    return read_images(path) if entries and all(entry.is_file() for entry in entries) else read_image_classes(path)


def _image(path: Path, line: int, name: str) -> Path:
    if not name:
        raise InputError(f"{path}, line {line}: names no image; fill the column or remove the row")
    file = path.parent / name
    if not file.is_file():
        raise InputError(f"{path}, line {line}: there is no image {file}; paths are from the folder of {path.name}")
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}, line {line}: {file} is no image by its extension; use {', '.join(SUFFIXES)}")
    check_header(file)
    return file
