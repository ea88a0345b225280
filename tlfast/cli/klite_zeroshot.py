"""tlfast klite zeroshot: label images by the texts of classes, by names alone and with knowledge."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import ImageTexts, InputError, check_suffix, format_rows, read_image_texts
from .dictionaries import GlossaryFile, NameColumn, NoBackOff, WiktionaryDump, WordNetFolder, read_classes
from .image_text import (
    Backbone,
    Choice,
    Classes,
    ClassNames,
    DevData,
    Fitting,
    ImageData,
    ImageText,
    Knowledge,
    Model,
    NoKnowledge,
    TemplateFile,
    class_scores,
    classes_of,
    image_bar,
    load_image_text,
    named,
    read_labelled,
    score_lines,
)
from .ladder_options import settings_of_the_user
from .output import emit, quiet_libraries

if TYPE_CHECKING:
    import torch

    from ..knowledge import ClassEmbeddings

_ROWS = 4096  # of the matrix of scores that exist at once
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def zeroshot(
    data_file: ImageData,
    backbone: Backbone = None,
    model: Model = None,
    text_backbone: Annotated[
        str | None, typer.Option(help="With --model: its text model, where that is not where it was in training.")
    ] = None,
    classes_file: Annotated[
        Path | None,
        typer.Option(
            "--classes",
            help="Candidates beyond the data's own labels: .txt, a name a line, a table with a column, or a folder.",
        ),
    ] = None,
    column: NameColumn = "name",
    names: ClassNames = None,
    dev_file: DevData = None,
    wordnet: WordNetFolder = None,
    wiktionary: WiktionaryDump = None,
    glossary: GlossaryFile = None,
    no_knowledge: NoKnowledge = False,
    no_back_off: NoBackOff = False,
    choice: Choice = "first",
    templates: TemplateFile = None,
    fitting: Fitting = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="A .tsv, .csv or .jsonl file for each image's class, by the blend.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Label images by the nearest text; with labels, score names alone, knowledge alone and both blended."""
    quiet_libraries()
    if out is not None:
        check_suffix(out)
    known = Knowledge(wordnet, wiktionary, glossary, not no_back_off, choice, templates, fitting, no_knowledge)
    known.check()
    if dev_file is not None and no_knowledge:
        raise InputError(
            "--dev: chooses how much knowledge counts, and --no-knowledge leaves it out; pass one of the two"
        )
    images = read_image_texts(data_file)
    dev = None if dev_file is None else read_labelled(dev_file)
    classes = _candidates(images, classes_file, column, names)
    labels = classes.encode(images, str(classes_file)) if images.labelled else None
    dev_labels = None if dev is None else classes.encode(dev, str(classes_file or data_file))
    dictionary = known.dictionary(as_json)
    found = load_image_text(backbone, model, text_backbone)
    embeddings, coverage = class_embeddings(known, classes, dictionary, found)
    vectors = embed(found, images, as_json)
    weight, by_weight = 0.5, None
    if dev is not None and not no_knowledge:
        assert dev_labels is not None
        weight, by_weight = choose_weight(embeddings, embed(found, dev, as_json), dev_labels)
    result: dict[str, Any] = {"model": found.source, "images": len(images), **coverage}
    if by_weight is not None:
        result["dev"] = {"weight": weight, "accuracies": {f"{w:g}": score for w, score in by_weight.items()}}
    lines = [coverage_line(coverage)] if dictionary is not None else []
    if labels is not None:
        with settings_of_the_user():  # embeddings that are not finite
            scores = class_scores(embeddings, vectors, labels, weight, not no_knowledge)
        result["scores"] = scores
        lines += score_lines(scores)
    wanted = embeddings.blend(0.0 if no_knowledge else weight)
    if out is not None:
        from ..training import write_whole

        rows = _predictions(images, vectors, wanted, classes, found)
        write_whole(out, format_rows(rows, out.suffix.lower()))
        result["out"] = str(out)
        lines.append(f"{len(rows):,} predictions are in {out}")
    elif labels is None:
        rows = _predictions(images, vectors, wanted, classes, found)
        result["predictions"] = rows
        lines += [f"{row['file']}\t{row['prediction']}\t{row['probability']:.4f}" for row in rows]
    emit(result, lines, as_json)


def class_embeddings(
    known: Knowledge, classes: Classes, dictionary: Any, found: ImageText
) -> tuple[ClassEmbeddings, dict[str, Any]]:
    """Embeddings of the classes' texts, and how many are known."""
    from ..knowledge import embed_classes

    with settings_of_the_user():  # embeddings that are not finite
        prompts, coverage = known.prompts(classes, dictionary, found.encoder)
        return embed_classes(prompts, found.encoder), coverage


def embed(found: ImageText, images: ImageTexts, quiet: bool) -> torch.Tensor:
    """(N, dim) embeddings of images, behind a progress bar."""
    from ..contrastive import embed_images

    with image_bar(len(images), quiet) as progress, settings_of_the_user():
        return embed_images(found.dual, images.files, found.processor, progress=progress)


def choose_weight(
    embeddings: ClassEmbeddings, vectors: torch.Tensor, labels: Sequence[int]
) -> tuple[float, dict[float, float]]:
    """The blend's weight that labelled dev images choose, and the accuracy of each."""
    import torch

    return embeddings.choose_weight(vectors, torch.tensor(labels))


def coverage_line(coverage: dict[str, Any]) -> str:
    """How many classes and captions are known, for people."""
    parts = [f"{coverage['covered']:,} of {coverage['classes']:,} classes"] if coverage["classes"] else []
    if coverage.get("captions"):
        parts.append(f"nouns of {coverage['captions_covered']:,} of {coverage['captions']:,} captions")
    return f"{' and '.join(parts)} are in {coverage['dictionary']}"


def numbered(given: Sequence[Hashable]) -> list[int]:
    """A number for each, the same for equal ones."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(one, len(numbers)) for one in given]


def _candidates(images: ImageTexts, classes_file: Path | None, column: str, names: Path | None) -> Classes:
    """The classes that images are labelled with: those of a file, or the data's own."""
    if classes_file is not None:
        return named(read_classes(classes_file, column), classes_file, names)
    if not any(images.labels):
        raise InputError(f"{images.path}: its images have no labels; pass the candidates by --classes")
    return classes_of(images, names)


def _predictions(
    images: ImageTexts, vectors: torch.Tensor, embedded: torch.Tensor, classes: Classes, found: ImageText
) -> list[dict[str, Any]]:
    """`file`, `prediction` (a label) and `probability` an image."""
    scale = float(found.dual.logit_scale)
    best = [(scale * part @ embedded.T).softmax(dim=1).max(dim=1) for part in vectors.split(_ROWS)]
    return [
        {"file": str(file), "prediction": classes.labels[place], "probability": round(probability, 6)}
        for file, probability, place in zip(
            images.files,
            (probability for part in best for probability in part.values.tolist()),
            (place for part in best for place in part.indices.tolist()),
            strict=True,
        )
    ]
