"""The image-text models, class names and texts that the commands of klite share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import ImageTexts, InputError, read_image_texts
from .backbone import LoadedBackbone, find_backbone, load_backbone, load_preprocessor
from .dictionaries import open_dictionary
from .ladder_options import settings_of_the_user
from .output import note, on_terminal

if TYPE_CHECKING:
    from ..contrastive import DualEncoder, TextEncoder
    from ..knowledge import ClassEmbeddings, ClassPrompts, Dictionary

SAVED = "klite.json"
TWO_TOWERS = ("clip", "siglip")
TOKENIZER, PROCESSOR = "tokenizer", "image_processor"

Backbone = Annotated[
    str | None,
    typer.Option(help="Folder or Hugging Face name of a CLIP or SigLIP model, taken as it is."),
]
Model = Annotated[Path | None, typer.Option("--model", help="The --out folder of tlfast klite train.")]
ImageData = Annotated[
    Path,
    typer.Option(
        "--data",
        help="Images: a folder with one for each class, or a .tsv, .csv or .jsonl with the columns image and label.",
    ),
]
DevData = Annotated[
    Path | None, typer.Option("--dev", help="Labelled images that choose the blend's weight; without it 0.5.")
]
NoKnowledge = Annotated[bool, typer.Option("--no-knowledge", help="Names alone; no dictionary is read.")]
Choice = Annotated[
    str,
    typer.Option(help='Which sense a class has: "first", or "nearest" to the other classes under the text encoder.'),
]
TemplateFile = Annotated[
    Path | None,
    typer.Option("--templates", help='A file with a template a line, {} for the name; default: "a photo of a {}."'),
]
Fitting = Annotated[
    str, typer.Option(help='What becomes of definitions that do not fit: "shorten", "chunk" or "auto".')
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        "--names",
        help="A .tsv, .csv or .jsonl with the columns label and name, where labels are no names: name is looked up and "
        "read. zeroshot and eval choose among all of its classes, whether or not there are images of them.",
    ),
]


@dataclass(frozen=True)
class ImageText:
    """A dual encoder with its tokenizer and image processor. source: what identifies it."""

    dual: DualEncoder
    tokenizer: Any
    processor: Any
    source: str

    @property
    def encoder(self) -> TextEncoder:
        """Texts to embeddings."""
        from ..contrastive import TextEncoder

        return TextEncoder(self.dual, self.tokenizer)


def load_image_text(backbone: str | None, model: Path | None, text_backbone: str | None = None) -> ImageText:
    """A CLIP or SigLIP model, or what tlfast klite train made, on a GPU where there is one.

    With a trained model, backbone and text_backbone are its frozen models, where these are not where they were.
    Raises InputError where neither is given or it cannot be used.
    """
    import torch

    if model is None and backbone is None:
        raise InputError("--backbone: is missing; pass a CLIP or SigLIP model, or --model with what klite train made")
    found = _own(str(backbone)) if model is None else _trained(model, backbone, text_backbone)
    found.dual.to("cuda" if torch.cuda.is_available() else "cpu")
    return found


def _own(backbone: str) -> ImageText:
    from ..contrastive import DualEncoder

    loaded, processor = load_both_towers(
        backbone, "pass a CLIP or SigLIP model, or train one on it by tlfast klite train and pass --model"
    )
    with settings_of_the_user():  # a model whose parts do not fit together
        dual = DualEncoder(loaded.model).eval()
    return ImageText(dual, loaded.tokenizer, processor, loaded.name)


def load_both_towers(backbone: str, advice: str) -> tuple[LoadedBackbone, Any]:
    """A CLIP or SigLIP model with its tokenizer, and its image processor; InputError, with advice, for another model.

    A folder's configuration is looked at first: other models may lack what would be loaded.
    """
    _check_both(backbone, _written_type(Path(find_backbone(backbone)) / "config.json"), advice)
    loaded = load_backbone(backbone)
    _check_both(backbone, getattr(loaded.model.config, "model_type", None), advice)
    return loaded, load_preprocessor(loaded.name, "AutoImageProcessor")


def _written_type(config: Path) -> str | None:
    """What kind of model a folder holds; None where it is not a folder, or damaged, as loading then says."""
    try:
        return json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_both(backbone: str, kind: Any, advice: str) -> None:
    if kind not in (None, *TWO_TOWERS):
        raise InputError(f"--backbone {backbone}: a {kind} model does not read both images and texts; {advice}")


def _trained(folder: Path, backbone: str | None, text_backbone: str | None) -> ImageText:
    from ..contrastive import DualEncoder

    saved = read_saved(folder)
    image: Any = None
    text: Any = None
    if saved["one_model"]:
        if not (saved["image_full"] and saved["text_full"]):
            image = load_backbone(backbone or saved["backbone"]).model
    else:
        if not saved["image_full"]:
            image = load_backbone(backbone or saved["backbone"], preprocessor_class="AutoImageProcessor").model
        if not saved["text_full"]:
            text = load_backbone(text_backbone or saved["text_backbone"]).model
    with settings_of_the_user():  # damaged files, or another frozen model
        dual = DualEncoder.from_pretrained(folder, image, text)
    tokenizer = load_preprocessor(str(folder / TOKENIZER), "AutoTokenizer")
    return ImageText(dual, tokenizer, load_preprocessor(str(folder / PROCESSOR), "AutoImageProcessor"), str(folder))


def read_saved(folder: Path) -> dict[str, Any]:
    """What klite train wrote of itself; InputError where the folder holds no trained model."""
    path = folder / SAVED
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; pass the --out of tlfast klite train")
    if not path.is_file():
        raise InputError(f"{folder}: holds no trained model ({SAVED} is missing); pass the --out of a finished run")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        needed = {"backbone", "text_backbone", "one_model", "image_full", "text_full"}
        if not isinstance(saved, dict) or needed - saved.keys():
            raise ValueError
    except (UnicodeDecodeError, ValueError):
        raise InputError(f"{path}: the file is damaged; train again") from None
    return saved


@dataclass(frozen=True)
class Classes:
    """Labels in their order, and what they are called. names: of each label, "a_b" as "a b"."""

    labels: tuple[str, ...]
    names: tuple[str, ...]

    def encode(self, images: ImageTexts, known: str) -> list[int]:
        """The labels of images as places; InputError for one that is not among the classes. known: what has them."""
        places = {label: place for place, label in enumerate(self.labels)}
        for i, label in enumerate(images.labels):
            if label not in places:
                raise InputError(
                    f"{images.where(i)}: the label {label!r} is not among the {len(places)} classes of {known}"
                )
        return [places[label] for label in images.labels]


def classes_of(images: ImageTexts, names: Path | None) -> Classes:
    """The classes of labelled images, in order; with --names all classes of that file, by its names.

    Raises InputError where an image has no label, a label has no name, or there is only one class.
    """
    for i, label in enumerate(images.labels):
        if not label:
            raise InputError(f"{images.where(i)}: has no label; add one, or make a folder for each class")
    if names is None:
        return named(ordered(images.labels), images.path, None)
    called = _read_names(names)
    labels = ordered([*images.labels, *called])
    _check_several(labels, images.path)
    return _with_names(labels, images.path, names, called)


def ordered(labels: Iterable[str]) -> list[str]:
    """The different labels, whole numbers by value; as they are written, since folders are called so."""
    different = set(labels)
    numbers = all(label.isdecimal() for label in different)
    return sorted(different, key=lambda label: (int(label) if numbers else 0, label))


def named(labels: Sequence[str], path: Path, names: Path | None) -> Classes:
    """Labels with their names; InputError where there is only one, or one has no name in the file."""
    _check_several(labels, path)
    if names is not None:
        return _with_names(labels, path, names, _read_names(names))
    return Classes(tuple(labels), tuple(" ".join(label.replace("_", " ").split()) for label in labels))


def _check_several(labels: Sequence[str], path: Path) -> None:
    if len(labels) < 2:
        raise InputError(f"{path}: there is only the class {labels[0]!r}; add images of at least one other")


def _with_names(labels: Sequence[str], path: Path, names: Path, called: dict[str, str]) -> Classes:
    """Labels of images at `path` by what a --names file calls them."""
    missing = next((label for label in labels if label not in called), None)
    if missing is not None:
        raise InputError(f"{names}: has no name for the label {missing!r} of {path}; add a row")
    return Classes(tuple(labels), tuple(called[label] for label in labels))


def _read_names(path: Path) -> dict[str, str]:
    """Label -> name of a --names file; InputError where a label is there twice."""
    from ..data import read_examples

    rows = read_examples(path, "label", "name", pairs=False)
    assert rows.labels is not None
    called: dict[str, str] = {}
    for i, (text, name) in enumerate(zip(rows.texts, rows.labels, strict=True)):
        label = text.strip()
        if label in called:
            raise InputError(f"{rows.where(i)}: the label {label!r} is there already; keep one row")
        called[label] = name
    return called


@dataclass(frozen=True)
class Knowledge:
    """Options of what is known about class names."""

    wordnet: str | None
    wiktionary: Path | None
    glossary: Path | None
    back_off: bool
    choice: str
    templates: Path | None
    fitting: str
    none: bool

    def check(self) -> None:
        """InputError for a choice that is not there, and for a dictionary that --no-knowledge would leave unread."""
        from ..knowledge import CHOICES

        if self.choice not in CHOICES:
            raise InputError(f"--choice {self.choice!r}: is not available; choose one of {', '.join(CHOICES)}")
        for option in ("wordnet", "wiktionary", "glossary"):
            if self.none and getattr(self, option) is not None:
                raise InputError(f"--{option}: is not read with --no-knowledge; leave one of them out")

    def dictionary(self, quiet: bool) -> Dictionary | None:
        """The dictionaries as one; None with --no-knowledge."""
        return None if self.none else open_dictionary(self.wordnet, self.wiktionary, self.glossary, quiet)

    def prompts(
        self, classes: Classes, dictionary: Dictionary | None, encoder: TextEncoder
    ) -> tuple[list[ClassPrompts], dict[str, Any]]:
        """Texts of each class within the encoder's tokens, and how many classes are known.

        A name that is a WordNet id reads as its word.
        """
        from .. import knowledge

        matches = [] if dictionary is None else [dictionary.find(name, self.back_off) for name in classes.names]
        templates = knowledge.TEMPLATES if self.templates is None else knowledge.read_templates(self.templates)
        if not matches:
            senses = [None] * len(classes.names)
        elif self.choice == "first":
            senses = knowledge.choose_first(matches)  # type: ignore[assignment]
        else:
            senses = knowledge.choose_nearest(matches, encoder.features)  # type: ignore[assignment]
        names = [match.read_as for match in matches] or list(classes.names)
        budget = knowledge.TokenBudget.of_tokenizer(encoder.tokenizer, encoder.max_length)
        prompts = knowledge.make_prompts(names, senses, budget, templates, self.fitting)
        covered = sum(match.covered for match in matches)
        return prompts, {
            "classes": len(classes.names),
            "covered": covered,
            "dictionary": dictionary and dictionary.name,
        }


def class_scores(
    embeddings: ClassEmbeddings, images: Any, labels: Sequence[int], weight: float, with_knowledge: bool
) -> dict[str, Any]:
    """Accuracy and top-5 accuracy by names alone and, with knowledge, by knowledge alone and by the blend."""
    from ..contrastive.evaluation import classify

    scores = {"name": classify(images, embeddings.names, labels)}
    if with_knowledge:
        scores["knowledge"] = classify(images, embeddings.knowledge, labels)
        scores["blend"] = classify(images, embeddings.blend(weight), labels) | {"weight": weight}
    return scores


def score_lines(scores: dict[str, Any]) -> list[str]:
    """Scores for people."""
    lines = []
    for name, found in scores.items():
        weight = f"  (weight of knowledge {found['weight']:g})" if "weight" in found else ""
        lines.append(f"{name:<10} accuracy {found['accuracy']:.4f}  top-5 {found['top5']:.4f}{weight}")
    return lines


def read_labelled(path: Path) -> ImageTexts:
    """Images of which each has a label."""
    images = read_image_texts(path)
    if not images.labelled:
        without = images.labels.index("")
        raise InputError(f"{images.where(without)}: has no label; add one, or make a folder for each class")
    return images


@contextmanager
def image_bar(total: int, quiet: bool) -> Iterator[Any]:
    """A progress bar over images; Ctrl-C ends with status 130."""
    from tqdm import tqdm

    with tqdm(total=total, unit="image", disable=quiet or not on_terminal()) as bar:
        try:
            yield bar.update
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(130) from None
