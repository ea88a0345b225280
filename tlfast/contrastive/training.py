"""Training a dual encoder on images with classes and captions by transformers.Trainer, as all commands of tlfast train.

Each image belongs to a group of texts (a class's, or its own caption's), of which every step takes one at random, with
or without knowledge (K-LITE); labels tell the UniCL loss which pairs of a batch belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from ..data import ImageDataset, InputError, stack_batch
from ..training import Fit, Settings, TaskData, fit
from ..training.evaluation import LabelledDataset
from ..training.processes import count
from ..training.scores import Scores, Scoring
from .dual import DualEncoder
from .encoders import TextEncoder, image_features
from .evaluation import TOP
from .texts import FEATURE_BYTES, TextBank


@dataclass(frozen=True)
class Pairs:
    """Images and, for each, its group of texts in a TextBank."""

    files: Sequence[Path]
    groups: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)


class FeatureDataset(Dataset):
    """Kept features of images: item i has `image_features` and `labels`, the image's group of texts."""

    truncated = 0

    def __init__(self, features: torch.Tensor, groups: Sequence[int]) -> None:
        self.features, self.groups = features, groups
        self.lengths = [1] * len(groups)

    @property
    def labels(self) -> list[int]:
        """The groups."""
        return list(self.groups)

    def select(self, indices: Sequence[int]) -> FeatureDataset:
        """The images at `indices`, in that order."""
        return FeatureDataset(self.features[list(indices)], [self.groups[i] for i in indices])

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image_features": self.features[index], "labels": self.groups[index]}


class PairModel(nn.Module):
    """What is trained: a dual encoder that draws each image's text; evaluated, it classifies among the candidates.

    candidates: how many groups, from the bank's first, images are classified into. forward(labels, pixel_values or
    image_features): labels (B,) int64, groups of the bank; in training the UniCL loss, else also logits (B,
    candidates), tau times the cosine with the mean of the texts that stand for each.
    """

    def __init__(self, dual: DualEncoder, bank: TextBank, encoder: TextEncoder, candidates: int) -> None:
        super().__init__()
        self.dual, self.bank, self.candidates = dual, bank, candidates
        self.encoder = TextEncoder(dual, encoder.tokenizer, encoder.max_length, encoder.batch_size)
        self._classes: torch.Tensor | None = None
        if count() > 1:
            dual.loss.group = dist.group.WORLD
        # DistributedDataParallel sends none of these: all processes have loaded the same models. Statistics of bodies
        # that are trained, such as a BatchNorm's, differ with the share of the batch
        self._ddp_params_and_buffers_to_ignore = [
            *(name for name, parameter in self.named_parameters() if not parameter.requires_grad),
            *(name for name, _ in self.named_buffers() if not _changes(name)),
        ]

    def train(self, mode: bool = True) -> PairModel:
        """What classes stand for changes with every step of training."""
        self._classes = None
        return super().train(mode)

    def forward(
        self,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        image = self.dual.encode_image(pixel_values, features=image_features)
        if self.training:
            text = self.bank.encode(self.encoder, self.bank.draw(labels.cpu()))
            own = self.bank.labels[labels.cpu()].to(image.device)
            return ImageClassifierOutput(loss=self.dual.loss(image, text, own))  # type: ignore[arg-type]
        logits = self.dual.logit_scale * image @ self.class_embeddings().to(image.device).T
        return ImageClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)  # type: ignore[arg-type]

    @torch.no_grad()
    def class_embeddings(self) -> torch.Tensor:
        """(candidates, dim), rows of length 1: the mean of the texts that stand for each."""
        if self._classes is None:
            texts = [self.bank.standing_for(group) for group in range(self.candidates)]
            flat = [text for group in texts for text in group]
            vectors = self.bank.encode(self.encoder, flat).split([len(group) for group in texts])
            self._classes = F.normalize(torch.stack([part.mean(dim=0) for part in vectors]), dim=1)
        return self._classes

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Save the dual encoder."""
        self.dual.save_pretrained(folder)


def _changes(name: str) -> bool:
    """Whether training changes a buffer: a ladder's first batch, or a body that is trained in full."""
    return name.endswith("calibrated") or ".body.model." in name or ".body.module." in name


class CandidateScoring(Scoring):
    """Which of the candidates an image is nearest to."""

    metric, more_is_better = "accuracy", True

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All of it: the loss of a batch needs its groups."""
        return batch

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, 3): whether the group is the nearest candidate and among the five nearest, and the cross-entropy."""
        logits = logits.float()
        own = logits.gather(1, labels[:, None])
        before = (logits > own).sum(dim=1)  # of equal ones the image is not to blame for the order
        ties = (logits == own).sum(dim=1) - 1
        rank = before + ties
        entropy = F.cross_entropy(logits, labels, reduction="none")
        return torch.stack([(rank < 1).float(), (rank < TOP).float(), entropy], dim=1)

    def score(self, kept: Sequence[np.ndarray], labels: Sequence[Any]) -> Scores:
        """Accuracy and top-5 accuracy in [0, 1], and the mean cross-entropy."""
        first, five, entropy = np.asarray(kept, dtype=np.float64).mean(axis=0).tolist()
        return {"accuracy": first, "top5": five, "loss": entropy}


@dataclass(frozen=True)
class Prepared:
    """Data ready for training. kept: which features were made once, of "image" and "text"."""

    data: TaskData
    bank: TextBank
    encoder: TextEncoder
    candidates: int
    kept: tuple[str, ...]


def prepare(
    dual: DualEncoder,
    bank: TextBank,
    encoder: TextEncoder,
    processor: Any,
    train: Pairs,
    dev: Pairs,
    candidates: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Prepared:
    """Data for `train_pairs`. Features of a tower that does not learn are made here, once, if they take at most 2 GiB.

    dev: its groups must be among the first `candidates` of the bank. processor: an image processor of transformers.
    progress: called with how many more images are done.
    Raises InputError for a broken image and where there is only one candidate, ValueError for groups out of range.
    """
    if candidates < 2:
        raise InputError("training data: there is only one class or caption; a contrast needs at least two")
    for name, pairs, limit in (("train", train, len(bank.groups)), ("dev", dev, candidates)):
        wrong = next((group for group in pairs.groups if not 0 <= group < limit), None)
        if wrong is not None:
            raise ValueError(f"{name}: the group {wrong} is not one of the {limit} that it may have")
    kept = ["text"] if bank.keep_features(encoder) else []
    size = 4 * (len(train) + len(dev)) * dual.image.width
    if dual.image.static and size <= FEATURE_BYTES:
        kept.insert(0, "image")

    def dataset(pairs: Pairs) -> LabelledDataset:
        if "image" not in kept:
            return ImageDataset(pairs.files, processor, pairs.groups)
        return FeatureDataset(image_features(dual, pairs.files, processor, progress=progress), pairs.groups)

    data = TaskData(dataset(train), dataset(dev), stack_batch, CandidateScoring())
    return Prepared(data, bank, encoder, candidates, tuple(kept))


def train_pairs(
    make_dual: Callable[[], DualEncoder],
    prepared: Prepared,
    settings: Settings,
    checkpoints: Path,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Fit:
    """`tlfast.training.fit` of dual encoders; the model in what it returns is a PairModel.

    make_dual: makes one for each learning rate, of fresh weights where they learn.
    Raises InputError where no parameter learns, and as `fit`.
    """

    def make() -> PairModel:
        dual = make_dual()
        if not dual.trainable_parameters():
            raise InputError("nothing learns in either tower; train a head, a ladder or all of one of them")
        return PairModel(dual, prepared.bank, prepared.encoder, prepared.candidates)

    return fit(make, prepared.data, settings, checkpoints, resume, progress, report)
