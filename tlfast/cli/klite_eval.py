"""tlfast klite eval: zero-shot scores of an image-text model, and what a linear probe and a few shots reach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import ImageTexts, InputError, read_image_texts, split_stratified
from .dictionaries import GlossaryFile, NoBackOff, WiktionaryDump, WordNetFolder
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
    read_labelled,
    score_lines,
)
from .klite_zeroshot import choose_weight, class_embeddings, coverage_line, embed, numbered
from .ladder_options import settings_of_the_user
from .output import emit, quiet_libraries

if TYPE_CHECKING:
    import torch

    Labelled = tuple[torch.Tensor, list[int]]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def evaluate(
    data_file: ImageData,
    backbone: Backbone = None,
    model: Model = None,
    text_backbone: Annotated[
        str | None, typer.Option(help="With --model: its text model, where that is not where it was in training.")
    ] = None,
    train_file: Annotated[
        Path | None,
        typer.Option("--train", help="Labelled images for a linear probe and a few shots on frozen features."),
    ] = None,
    dev_file: DevData = None,
    names: ClassNames = None,
    wordnet: WordNetFolder = None,
    wiktionary: WiktionaryDump = None,
    glossary: GlossaryFile = None,
    no_knowledge: NoKnowledge = False,
    no_back_off: NoBackOff = False,
    choice: Choice = "first",
    templates: TemplateFile = None,
    fitting: Fitting = "auto",
    shots: Annotated[str, typer.Option(help="Images a class, separated by commas.")] = "1,2,4,8,16",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of each number of shots.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the dev tenth, where there is no --dev.")] = 0,
    as_json: Json = False,
) -> None:
    """Score images with classes, zero-shot and by probes, or images with captions, by retrieval both ways.

    Without --dev the blend's weight is 0.5, and a tenth of --train chooses the probe's regularisation.
    """
    quiet_libraries()
    known = Knowledge(wordnet, wiktionary, glossary, not no_back_off, choice, templates, fitting, no_knowledge)
    known.check()
    counts = _counts(shots)
    images = read_image_texts(data_file)
    if all(images.captions) and not any(images.labels):
        for option, path in (("--train", train_file), ("--dev", dev_file), ("--names", names)):
            if path is not None:
                raise InputError(f"{option}: means nothing for images with captions and no labels; leave it out")
        found = load_image_text(backbone, model, text_backbone)
        result, lines = _retrieval(found, images, as_json)
        emit(result, lines, as_json)
        return
    classes = classes_of(images, names)
    dev, train = (None if path is None else read_labelled(path) for path in (dev_file, train_file))
    dictionary = known.dictionary(as_json)
    found = load_image_text(backbone, model, text_backbone)
    job = Scores(found, classes, str(data_file), as_json)
    test_features, labels = job.features(images), classes.encode(images, str(data_file))
    embeddings, coverage = class_embeddings(known, classes, dictionary, found)
    dev_features = None if dev is None else job.features(dev)
    weight = 0.5
    if dev is not None and not no_knowledge:
        weight, _ = choose_weight(embeddings, job.vectors(dev_features), classes.encode(dev, str(data_file)))
    with settings_of_the_user():  # embeddings that are not finite
        scores = class_scores(embeddings, job.vectors(test_features), labels, weight, not no_knowledge)
    result = {"model": found.source, "images": len(images), **coverage, "zeroshot": scores}
    lines = [coverage_line(coverage)] if dictionary is not None else []
    lines += score_lines(scores)
    if train is not None:
        parts = job.parts(train, dev, dev_features, seed)
        result |= _probes(parts, (test_features, labels), counts, seeds)
        lines += _probe_lines(result)
    emit(result, lines, as_json)


class Scores:
    """Features of images behind progress bars, and probes on them. source: what has the classes."""

    def __init__(self, found: ImageText, classes: Classes, source: str, quiet: bool) -> None:
        self.found, self.classes, self.source, self.quiet = found, classes, source, quiet

    def features(self, images: ImageTexts) -> torch.Tensor:
        """(N, width) of the image tower, before its head."""
        from ..contrastive import image_features

        with image_bar(len(images), self.quiet) as progress, settings_of_the_user():
            return image_features(self.found.dual, images.files, self.found.processor, progress=progress)

    def vectors(self, features: Any) -> torch.Tensor:
        """(N, dim) embeddings."""
        import torch

        with torch.no_grad(), self.found.dual.evaluating():
            return self.found.dual.encode_image(features=features).cpu()

    def parts(
        self, train: ImageTexts, dev: ImageTexts | None, dev_features: Any, seed: int
    ) -> tuple[Labelled, Labelled]:
        """Features and labels for training and for choosing; without dev a tenth of the training data chooses."""
        if dev is None:
            train, dev = split_stratified(train, self.classes.encode(train, self.source), seed)
            dev_features = self.features(dev)
        return (
            (self.features(train), self.classes.encode(train, self.source)),
            (dev_features, self.classes.encode(dev, self.source)),
        )


def _probes(parts: tuple[Labelled, Labelled], test: Labelled, shots: list[int], seeds: int) -> dict[str, Any]:
    """A linear probe on all training images and on a few of each class."""
    from ..contrastive.probing import few_shot, linear_probe

    (train, labels), (dev, dev_labels) = parts
    return {
        "linear_probe": linear_probe(train, labels, dev, dev_labels, *test),
        "few_shot": few_shot(train, labels, *test, shots=shots, seeds=seeds),
    }


def _retrieval(found: ImageText, images: ImageTexts, quiet: bool) -> tuple[dict[str, Any], list[str]]:
    from ..contrastive.evaluation import retrieve

    vectors = embed(found, images, quiet)
    with settings_of_the_user():
        scores = retrieve(
            vectors, found.encoder(images.captions), numbered(images.captions), numbered(images.same_file)
        )
    lines = score_lines({name.replace("_", " "): score for name, score in scores.items()})
    return {"model": found.source, "images": len(images), "retrieval": scores}, lines


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise InputError(f"--shots {text!r}: pass numbers of at least 1, separated by commas, such as 1,2,4,8,16")
    return counts


def _probe_lines(result: dict[str, Any]) -> list[str]:
    probe = result["linear_probe"]
    lines = [f"{'probe':<10} accuracy {probe['accuracy']:.4f}  ({probe['n']:,} images, C {probe['C']:g} by dev)"]
    for row in result["few_shot"]:
        if "missing" in row:
            lines.append(f"{row['shots']:>3} shots   a class has only {row['missing']} images")
            continue
        spread = "" if row["std"] is None else f" +- {row['std']:.4f}  ({len(row['accuracies'])} draws)"
        lines.append(f"{row['shots']:>3} shots  accuracy {row['accuracy']:.4f}{spread}")
    return lines
