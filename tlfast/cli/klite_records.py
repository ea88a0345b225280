"""What tlfast klite train is given: images with their classes and captions, the texts of these, and two towers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import ImageTexts, InputError, read_image_texts, split_random, split_stratified
from .backbone import load_backbone
from .image_text import Classes, ImageText, Knowledge, load_both_towers, named, ordered
from .ladder_options import settings_of_the_user
from .output import note

if TYPE_CHECKING:
    from ..contrastive import DualEncoder, TextEncoder
    from ..contrastive.texts import TextBank, TextGroup
    from ..knowledge import Dictionary


@dataclass(frozen=True)
class Records:
    """Training and dev images and their classes, None where no training image has one; the test is read at the end."""

    train: ImageTexts
    dev: ImageTexts
    classes: Classes | None
    test_file: Path | None

    def picture_digest(self) -> str:
        """SHA-256 of the training and dev images that tables only name, by which a resumed run knows them again.

        Those of folders are in the folders' own digests.
        """
        from ..training import file_digest

        named = (images.same_file for images in (self.train, self.dev) if images.lines is not None)
        files = sorted({file for files in named for file in files})
        return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()

    def read_test(self) -> ImageTexts | None:
        """The test images; what is wrong with them costs no training: mended, --resume goes on from there."""
        if self.test_file is None:
            return None
        try:
            images = read_image_texts(self.test_file)
            _check_texts(images, "test")
            if images.labelled and self.classes is None:
                raise InputError(f"{self.test_file}: has labels, and the training data have none; pass captions")
            if images.labelled and self.classes is not None:
                self.classes.encode(images, str(self.train.path))
            elif not all(images.captions):
                raise InputError(f"{self.test_file}: some images have labels and others captions; pass one kind")
        except InputError as error:
            raise InputError(f"{error}; training is kept: mend the test file and add --resume") from error
        return images


def read_records(
    train_file: Path, dev_file: Path | None, test_file: Path | None, names: Path | None, seed: int
) -> Records:
    """Read training and dev data; without a dev file a seeded tenth of the training data is dev.

    Raises InputError for what is wrong with the files, and where the test is missing.
    """
    if test_file is not None and not test_file.exists():
        raise InputError(f"{test_file}: there is no such file or folder; check the path")
    train = read_image_texts(train_file)
    _check_texts(train, "training")
    labels = [label for label in train.labels if label]
    classes = named(ordered(labels), train.path, names) if labels else None
    if dev_file is not None:
        dev = read_image_texts(dev_file)
        _check_texts(dev, "dev")
    else:
        train, dev = _split(train, classes, seed)
    return Records(train, _one_caption(dev), classes, test_file)


def _one_caption(dev: ImageTexts) -> ImageTexts:
    """Of an image without a class the first caption: as candidates of dev the others would count as wrong."""
    seen: set[Path] = set()
    rows = []
    for i, (file, label) in enumerate(zip(dev.same_file, dev.labels, strict=True)):
        if label or file not in seen:
            rows.append(i)
        if not label:
            seen.add(file)
    return dev.select(rows)


def _split(rows: ImageTexts, classes: Classes | None, seed: int) -> tuple[ImageTexts, ImageTexts]:
    """A tenth of the images for dev, each with all of its rows: none is trained on by another caption."""
    files = rows.same_file
    first: dict[Path, int] = {}
    for i, file in enumerate(files):
        first.setdefault(file, i)
    images = rows.select(first.values())
    if rows.labelled and classes is not None:
        _, dev = split_stratified(images, classes.encode(images, str(rows.path)), seed)
    else:
        _, dev = split_random(images, seed)
    held = set(dev.same_file)
    parts = ([i for i, file in enumerate(files) if (file in held) is wanted] for wanted in (False, True))
    train_rows, dev_rows = map(rows.select, parts)
    return train_rows, dev_rows


def _check_texts(images: ImageTexts, what: str) -> None:
    """A flat folder has neither labels nor captions."""
    if not any(images.labels) and not any(images.captions):
        raise InputError(
            f"{images.path}: {what} images need classes or captions; make a folder for each class, or pass a table"
        )


@dataclass(frozen=True)
class Texts:
    """Groups of texts, and the group of each training and dev image. candidates: groups that dev is classified into."""

    bank: TextBank
    train: list[int]
    dev: list[int]
    candidates: int
    coverage: dict[str, Any]


def make_texts(
    records: Records, known: Knowledge, dictionary: Dictionary | None, encoder: TextEncoder, share: float
) -> Texts:
    """Texts of classes, then of dev captions, then of training captions, with knowledge where a dictionary has some."""
    from ..contrastive.texts import TextBank, TextGroup

    groups: list[TextGroup] = []
    coverage: dict[str, Any] = {"dictionary": dictionary and dictionary.name, "classes": 0, "covered": 0}
    if records.classes is not None:
        with settings_of_the_user():  # a text model whose embeddings are not finite, where it chooses senses
            prompts, coverage = known.prompts(records.classes, dictionary, encoder)
        for place, prompt in enumerate(prompts):
            texts = tuple(text for group in prompt.knowledge for text in group if prompt.sense is not None)
            groups.append(TextGroup(place, prompt.names, texts))
    # a dev image with a class is classified; a training image with a caption learns from that
    captions: dict[tuple[str, str], int] = {}
    dev = _places(records.dev, records.classes, [not label for label in records.dev.labels], captions)
    candidates = len(groups) + len(captions)
    train = _places(records.train, records.classes, [bool(caption) for caption in records.train.captions], captions)
    labels = _caption_labels(list(captions), records, train)
    of_captions = _caption_groups(list(captions), labels, dictionary, encoder)
    if captions:
        covered = sum(bool(group.knowledge) for group in of_captions)
        coverage |= {"captions": len(captions), "captions_covered": covered}
    with settings_of_the_user():
        return Texts(TextBank([*groups, *of_captions], share), train, dev, candidates, coverage)


def _places(
    images: ImageTexts, classes: Classes | None, own: Sequence[bool], captions: dict[tuple[str, str], int]
) -> list[int]:
    """The group of each image: its class's or, where it has its own, that of its label and caption.

    captions: the groups of these, behind those of the classes; new ones are added. Equal captions are one group.
    """
    places_of = {} if classes is None else {label: i for i, label in enumerate(classes.labels)}
    places = []
    for i, (label, caption, alone) in enumerate(zip(images.labels, images.captions, own, strict=True)):
        if label and label not in places_of:
            raise InputError(
                f"{images.where(i)}: the label {label!r} is not among the {len(places_of)} classes of the training data"
            )
        next_one = len(places_of) + len(captions)
        places.append(captions.setdefault((label, caption), next_one) if alone else places_of[label])
    return places


def _caption_labels(captions: Sequence[tuple[str, str]], records: Records, train: Sequence[int]) -> list[int]:
    """The label of each (label, caption): its class's, or one that the captions of an image share, and they alone.

    train: the group of each training image, as `_places` gives it. The UniCL loss takes captions of other labels for
    wrong, and the other captions of an image are right.
    """
    places = {} if records.classes is None else {label: i for i, label in enumerate(records.classes.labels)}
    leads_to = list(range(len(places) + len(captions)))

    def first(group: int) -> int:
        while leads_to[group] != group:
            group = leads_to[group]
        return group

    of_image: dict[Path, int] = {}
    for file, group in zip(records.train.same_file, train, strict=True):
        if group >= len(places) and not captions[group - len(places)][0]:
            kept, other = sorted((first(of_image.setdefault(file, group)), first(group)))
            leads_to[other] = kept
    return [places.get(label, first(len(places) + i)) for i, (label, _) in enumerate(captions)]


def _caption_groups(
    captions: Sequence[tuple[str, str]], labels: Sequence[int], dictionary: Dictionary | None, encoder: TextEncoder
) -> list[TextGroup]:
    """Texts of (label, caption), which the loss knows by these labels."""
    from .. import knowledge
    from ..contrastive.texts import TextGroup
    from ..training import processes

    texts = [caption for _, caption in captions]
    budget = knowledge.TokenBudget.of_tokenizer(encoder.tokenizer, encoder.max_length)
    cut = sum(not budget.fits(text) for text in texts)
    if cut and processes.is_first():
        note(f"{cut:,} captions are longer than the text model's {encoder.max_length} tokens and lose their end")
    if dictionary is None:
        return [TextGroup(label, (text,)) for label, text in zip(labels, texts, strict=True)]
    return [
        TextGroup(label, (made.plain,), () if made.knowledge is None else (made.knowledge,))
        for label, made in zip(labels, knowledge.augment_captions(texts, dictionary, budget), strict=True)
    ]


@dataclass(frozen=True)
class TowerOptions:
    """What the options say of the two towers."""

    image_train: str
    text_train: str
    head: str | None
    dim: int | None
    reduction: int
    precision: str
    centre_texts: bool

    def config(self, train: str) -> Any:
        """A TowerConfig. Raises ValueError for settings that are not there."""
        from ..contrastive import TowerConfig
        from ..ladder import LadderConfig

        return TowerConfig(
            train,
            None if train == "nothing" else self.head,
            ladder=LadderConfig(reduction=self.reduction) if train == "ladder" else None,
            precision="fp32" if train == "full" else self.precision,
        )


@dataclass(frozen=True)
class Towers:
    """The models of both towers, what reads their inputs, and what of each learns. text: None: the first has both."""

    image: Any
    text: Any
    tokenizer: Any
    processor: Any
    names: tuple[str, str | None]
    wanted: TowerOptions

    def make(self) -> DualEncoder:
        """A dual encoder of fresh weights: what is trained as a whole is copied, what is frozen shared."""
        from ..contrastive import DualEncoder

        wanted = self.wanted
        image_full, text_full = wanted.image_train == "full", wanted.text_train == "full"
        image = copy.deepcopy(self.image) if image_full or (self.text is None and text_full) else self.image
        text = copy.deepcopy(self.text) if text_full else self.text
        return DualEncoder(image, text, wanted.config(wanted.image_train), wanted.config(wanted.text_train), wanted.dim)

    def make_first(self) -> DualEncoder:
        """`make`; InputError for towers that do not fit together, and where options mean nothing for them."""
        with settings_of_the_user():
            dual = self.make()
        if not dual.trainable_parameters():
            raise InputError("nothing learns in either tower; train a head, a ladder or all of one of them")
        if self.wanted.centre_texts and not dual.text.static:
            raise InputError("--centre-texts: the text tower learns and centres itself; leave it out")
        return dual

    def image_text(self, dual: DualEncoder) -> ImageText:
        """A dual encoder of these towers, with what reads its inputs."""
        return ImageText(dual, self.tokenizer, self.processor, self.title)

    def saved(self) -> dict[str, Any]:
        """What finds the models again."""
        return {
            "backbone": self.names[0],
            "text_backbone": self.names[1],
            "one_model": self.text is None,
            "image_full": self.wanted.image_train == "full",
            "text_full": self.wanted.text_train == "full",
        }

    @property
    def title(self) -> str:
        """Both models' names."""
        return " and ".join(Path(name).name for name in self.names if name)


def load_towers(backbone: str, text_backbone: str | None, wanted: TowerOptions) -> Towers:
    """Load the models; InputError where they cannot be, and where the image model alone has no text tower."""
    if text_backbone is None:
        loaded, processor = load_both_towers(backbone, "add --text-backbone, or pass a CLIP or SigLIP model")
        return Towers(loaded.model, None, loaded.tokenizer, processor, (loaded.name, None), wanted)
    image = load_backbone(backbone, preprocessor_class="AutoImageProcessor")
    text = load_backbone(text_backbone)
    return Towers(image.model, text.model, text.tokenizer, image.tokenizer, (image.name, text.name), wanted)
