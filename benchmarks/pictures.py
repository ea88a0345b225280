"""Sets of pictures with class names, of which some classes are never trained on, and what is asked of the others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tlfast.data import InputError, read_image_classes
from tlfast.data.images import open_image

STORED = 40  # pixels a side; views of 32 are sampled from them
UNSEEN_SHARE, SPLIT_SEED = 0.15, 0
FEWEST = 4  # of which UNSEEN_SHARE is one
_COMMONEST = {"a", "an", "and", "for", "in", "of", "on", "the", "with"}


@dataclass(frozen=True)
class Trial:
    """A question: which of `candidates`, classes in ascending order, does each picture in `rows` show?"""

    rows: torch.Tensor
    candidates: torch.Tensor


@dataclass(frozen=True)
class PictureSet:
    """Pictures of classes.

    pictures: (N, 4, STORED, STORED) uint8, RGBA with colours times opacity. labels: (N,) int64. names: for each class
    what it is called, the best name first. seen: classes that are trained on. training: rows trained on, all of them
    of seen classes. trials: by name.
    """

    pictures: torch.Tensor
    labels: torch.Tensor
    names: tuple[tuple[str, ...], ...]
    seen: torch.Tensor
    training: torch.Tensor
    trials: dict[str, Trial]


def split_classes(classes: Sequence[int], seed: int = SPLIT_SEED) -> tuple[torch.Tensor, torch.Tensor]:
    """Seen and unseen ones, the latter UNSEEN_SHARE of them."""
    order = random.Random(seed).sample(classes, len(classes))
    unseen = round(UNSEEN_SHARE * len(classes))
    return torch.tensor(sorted(order[unseen:])), torch.tensor(sorted(order[:unseen]))


def store(images: torch.Tensor) -> torch.Tensor:
    """(N, 4, H, W) uint8 RGBA -> what a PictureSet keeps."""
    x = images.float() / 255
    x[:, :3] *= x[:, 3:]
    x = F.interpolate(x, size=(STORED, STORED), mode="bilinear", antialias=True, align_corners=False)
    return (255 * x).round().to(torch.uint8)


def has_no_seen_word(names: Sequence[Sequence[str]], seen: Sequence[int]) -> torch.Tensor:
    """(C,) bool: whether a class's first name has no word, the commonest left out, of any seen class's."""
    known = {word for number in seen for word in _words(names[number][0])}
    return torch.tensor([known.isdisjoint(_words(name[0])) for name in names])


def read_folder(path: Path, seed: int = SPLIT_SEED) -> PictureSet:
    """A folder with a folder of images for each class, called by its name, such as CIFAR-100's or ImageNet's.

    A share of each seen class's images is not trained on. Raises InputError for what `read_image_classes` refuses, and
    for classes or images that are too few for every part of the split.
    """
    images = read_image_classes(path)
    assert images.labels is not None
    classes = sorted(set(images.labels))
    labels = torch.tensor([classes.index(label) for label in images.labels])
    if len(classes) < FEWEST or int(labels.bincount().min()) < FEWEST:
        rare = classes[int(labels.bincount().argmin())]
        raise InputError(
            f"{path}: has {len(classes)} classes, of which {rare!r} has {int(labels.bincount().min())} images; pass at "
            f"least {FEWEST} classes of {FEWEST} images"
        )
    pictures = torch.empty(len(images.files), 4, STORED, STORED, dtype=torch.uint8)  # once: the set may be large
    for row, file in enumerate(images.files):
        pictures[row] = store(_opaque(file))[0]
    seen, unseen = split_classes(range(len(classes)), seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for number in seen.tolist():
        rows = (labels == number).nonzero().flatten().tolist()
        held_out[random.Random(f"{seed} {number}").sample(rows, round(UNSEEN_SHARE * len(rows)))] = True
    names = tuple((name.replace("_", " "),) for name in classes)
    trials = {
        "unseen classes": Trial(torch.isin(labels, unseen).nonzero().flatten(), unseen),
        "seen classes, other images": Trial(held_out.nonzero().flatten(), seen),
    }
    training = (torch.isin(labels, seen) & ~held_out).nonzero().flatten()
    return PictureSet(pictures, labels, names, seen, training, trials)


def _words(name: str) -> set[str]:
    return set(name.lower().replace("-", " ").split()) - _COMMONEST


def _opaque(file: Path) -> torch.Tensor:
    image = open_image(file).convert("RGBA")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
