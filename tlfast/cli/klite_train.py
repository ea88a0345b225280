"""tlfast klite train: a dual encoder of images and texts, with knowledge in the texts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError
from .dictionaries import GlossaryFile, NoBackOff, WiktionaryDump, WordNetFolder
from .image_text import (
    PROCESSOR,
    SAVED,
    TOKENIZER,
    Choice,
    ClassNames,
    Fitting,
    ImageText,
    Knowledge,
    NoKnowledge,
    TemplateFile,
    class_scores,
    image_bar,
    score_lines,
)
from .klite_records import Records, Texts, TowerOptions, Towers, load_towers, make_texts, read_records
from .klite_zeroshot import choose_weight, class_embeddings, coverage_line, embed, numbered
from .ladder_options import learning_rates, settings_of_the_user
from .output import emit, note, on_terminal, quiet_libraries

if TYPE_CHECKING:
    from ..contrastive import DualEncoder
    from ..contrastive.training import Prepared
    from ..knowledge import Dictionary
    from ..training import Fit, RunFolder, Settings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Train = '"nothing", "head", "ladder" or "full"'


def train(
    backbone: Annotated[
        str,
        typer.Option(help="Folder or Hugging Face name of the image model; a CLIP or SigLIP model gives both towers."),
    ],
    train_file: Annotated[
        Path,
        typer.Option(
            "--train",
            help="A folder with one for each class, or a .tsv, .csv or .jsonl with the column image, and label, caption"
            " or both.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model, metrics.json, curve.png and checkpoints.")],
    text_backbone: Annotated[
        str | None, typer.Option(help='Folder or Hugging Face name of the text model, or "minilm".')
    ] = None,
    dev_file: Annotated[
        Path | None, typer.Option("--dev", help="Data that select; without it a seeded tenth of the training data.")
    ] = None,
    test_file: Annotated[
        Path | None, typer.Option("--test", help="Images with classes, or with captions; read once, after selection.")
    ] = None,
    image_train: Annotated[str, typer.Option(help=f"What of the image tower learns: {Train}.")] = "head",
    text_train: Annotated[str, typer.Option(help=f"What of the text tower learns: {Train}.")] = "head",
    head: Annotated[str | None, typer.Option(help='Of towers that learn: "linear" (the default) or "mlp".')] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Width that both towers share; default: the models'.")] = None,
    reduction: Annotated[
        int, typer.Option(min=1, help="Of ladders: the side network is this many times narrower.")
    ] = 8,
    centre_texts: Annotated[
        bool, typer.Option("--centre-texts", help="Take what all class texts have in common off a frozen text model's.")
    ] = False,
    names: ClassNames = None,
    wordnet: WordNetFolder = None,
    wiktionary: WiktionaryDump = None,
    glossary: GlossaryFile = None,
    no_knowledge: NoKnowledge = False,
    no_back_off: NoBackOff = False,
    choice: Choice = "first",
    templates: TemplateFile = None,
    fitting: Fitting = "auto",
    knowledge_share: Annotated[
        float, typer.Option(min=0, max=1, help="How often a step takes a text with knowledge.")
    ] = 0.5,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=2)] = 256,
    lr: Annotated[str, typer.Option(help="Learning rate; of several, separated by commas, dev chooses.")] = "1e-3",
    precision: Annotated[str, typer.Option(help="Of frozen weights: fp32, bf16, int8 or nf4.")] = "fp32",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train towers, ladders or heads by the UniCL loss on images with classes or captions; dev selects the epoch.

    Every step takes one text of each image's class or caption at random, with or without knowledge. torchrun
    --nproc-per-node 2 --no-python tlfast klite train ... shares each batch between two processes.
    """
    quiet_libraries()
    from .. import training
    from ..backbone import fingerprint
    from ..training import processes

    known = Knowledge(wordnet, wiktionary, glossary, not no_back_off, choice, templates, fitting, no_knowledge)
    known.check()
    for option, path in (("--templates", templates), ("--names", names)):
        if path is not None and not path.is_file():
            raise InputError(f"{option} {path}: there is no such file; check the path")
    settings = training.Settings(epochs, batch_size, learning_rates(lr), seed=seed)
    records = read_records(train_file, dev_file, test_file, names, seed)
    dictionary = known.dictionary(as_json)
    wanted = TowerOptions(image_train, text_train, head, dim, reduction, precision, centre_texts)
    towers = load_towers(backbone, text_backbone, wanted)
    first = towers.make_first()
    identity = {
        "command": "klite train",
        "backbones": towers.names,
        "fingerprints": [
            tower.body.fingerprint() or fingerprint(tower.body, "") for tower in (first.image, first.text)
        ],
        "towers": asdict(wanted),
        "data_sha256": [
            None if path is None else training.file_digest(path)
            for path in (train_file, dev_file, names, templates, glossary)
        ],
        "pictures_sha256": records.picture_digest(),
        "dictionary": None if dictionary is None else dictionary.name,
        "knowledge": [choice, fitting, no_back_off, knowledge_share],
        "training": asdict(settings),
    }
    test_digest = None if test_file is None else training.file_digest(test_file)
    run = training.RunFolder(out)
    if resume and run.finished and run.read_metrics().get("test_sha256", test_digest) != test_digest:
        raise InputError(f"{out}: is finished, with another test file; score it by tlfast klite eval --model {out}")
    try:
        with processes.together(), run.session(identity, resume) if processes.is_first() else nullcontext():
            processes.wait()  # the folder is claimed
            if not run.finished:
                quiet = as_json or not processes.is_first()
                texts = make_texts(records, known, dictionary, towers.image_text(first).encoder, knowledge_share)
                job = Job(towers, records, texts, settings, known, dictionary, quiet)
                fit, data = job.fit(run, first, resume)
                if processes.is_first():
                    job.write(run, fit, data, {"test_sha256": test_digest}, f"{train_file.name}: {towers.title}")
            is_first = processes.is_first()
    except (training.InterruptedTraining, KeyboardInterrupt):
        kept = "run the same command with --resume to go on" if run.has_checkpoint() else "there is nothing to resume"
        note(f"interrupted; {kept}")
        raise typer.Exit(130) from None
    if is_first:
        metrics = run.read_metrics()
        emit(metrics, _report(metrics, out), as_json)


@dataclass(frozen=True)
class Job:
    """One training run: what it is made of, and what it leaves."""

    towers: Towers
    records: Records
    texts: Texts
    settings: Settings
    known: Knowledge
    dictionary: Dictionary | None
    quiet: bool

    def fit(self, run: RunFolder, first: DualEncoder, resume: bool) -> tuple[Fit, Prepared]:
        """Train. first: a dual encoder whose frozen towers make the features that are kept."""
        import torch

        from ..contrastive.training import Pairs, prepare, train_pairs

        found = self.towers.image_text(first.to("cuda" if torch.cuda.is_available() else "cpu"))
        train, dev = (
            Pairs(images.files, groups)
            for images, groups in ((self.records.train, self.texts.train), (self.records.dev, self.texts.dev))
        )
        with image_bar(len(train) + len(dev), self.quiet) as progress, settings_of_the_user():
            data = prepare(
                first, self.texts.bank, found.encoder, found.processor, train, dev, self.texts.candidates, progress
            )
        centre = self._centre(found) if self.towers.wanted.centre_texts else None

        def make() -> DualEncoder:
            dual = self.towers.make()
            if centre is not None:
                dual.text.centre_on(centre)
            return dual

        bar = on_terminal() and not self.quiet
        report = (lambda line: None) if self.quiet else note
        return train_pairs(make, data, self.settings, run.checkpoints, resume, bar, report), data

    def write(self, run: RunFolder, fit: Fit, data: Prepared, more: dict[str, Any], title: str) -> None:
        """Model, preprocessors, klite.json, curve.png and metrics.json: all of them or none."""
        from ..training.curve import draw_curve
        from ..training.results import CURVE

        metrics = self._metrics(fit, data) | more
        found = self.towers.image_text(fit.model.dual)  # type: ignore[arg-type]
        with run.publish() as folder:
            found.dual.save_pretrained(folder)
            found.tokenizer.save_pretrained(folder / TOKENIZER)
            found.processor.save_pretrained(folder / PROCESSOR)
            (folder / SAVED).write_text(json.dumps(self.towers.saved(), indent=2) + "\n", encoding="utf-8")
            draw_curve(folder / CURVE, fit.chosen.history, "accuracy", fit.chosen.best_epoch, title)
            run.write_metrics(folder, metrics)

    def _centre(self, found: ImageText) -> Any:
        """Features of the class texts."""
        texts = [text for group in range(self.texts.candidates) for text in self.texts.bank.standing_for(group)]
        return found.encoder.features(texts)

    def _metrics(self, fit: Fit, data: Prepared) -> dict[str, Any]:
        dual: Any = fit.model.dual
        test, seconds = self._test(dual), fit.chosen.epoch_seconds
        best = test.get("blend") or test.get("name")
        return {
            **({"accuracy": best["accuracy"]} if best else {}),
            "dev": fit.dev,
            "test": test,
            "selected_by": "dev accuracy",
            "learning_rate": fit.chosen.learning_rate,
            "best_epoch": fit.chosen.best_epoch,
            "trials": [{"learning_rate": trial.learning_rate, "dev": trial.dev} for trial in fit.trials],
            "epochs": self.settings.epochs,
            "seconds_per_epoch": sum(seconds) / len(seconds),
            "epoch_seconds": list(seconds),
            "trained_parameters": dual.trainable_parameters(),
            "logit_scale": float(dual.logit_scale),
            "examples": {"train": len(self.records.train), "dev": len(self.records.dev)},
            "features_made_once": list(data.kept),
            "candidates": data.candidates,
            **self.texts.coverage,
            **_cost(fit, data, self.settings.batch_size),
        }

    def _test(self, dual: DualEncoder) -> dict[str, Any]:
        """Scores of the test images, by classes or, where they have only captions, by retrieval; {} without a test."""
        from ..contrastive.evaluation import retrieve

        images = self.records.read_test()
        if images is None:
            return {}
        found = self.towers.image_text(dual)
        vectors = embed(found, images, self.quiet)
        if not images.labelled:
            return retrieve(
                vectors, found.encoder(images.captions), numbered(images.captions), numbered(images.same_file)
            )
        classes = self.records.classes
        assert classes is not None  # else the test images were refused
        labels = classes.encode(images, str(self.records.train.path))
        embeddings, _ = class_embeddings(self.known, classes, self.dictionary, found)
        weight = 0.5
        if self.dictionary is not None and self.records.dev.labelled:
            dev = embed(found, self.records.dev, self.quiet)
            weight, _ = choose_weight(embeddings, dev, classes.encode(self.records.dev, str(self.records.train.path)))
        return class_scores(embeddings, vectors, labels, weight, self.dictionary is not None)


def _cost(fit: Fit, data: Prepared, batch_size: int) -> dict[str, Any]:
    """What training took: bytes kept for the backward pass, peak memory; and where it ran.

    The model stays as it was scored: a step in train mode moves statistics, such as a BatchNorm's, which are put back.
    """
    import torch

    from ..bench import measure
    from ..training import typical_batch

    device = next(fit.model.parameters()).device
    fit.model.dual.loss.group = None  # type: ignore[union-attr]  # the other processes take no part
    batch = {name: x.to(device) for name, x in typical_batch(data.data, batch_size).items()}
    learnt = fit.model.state_dict().keys()  # what is frozen stays, and may be large
    kept = {name: buffer.clone() for name, buffer in fit.model.named_buffers() if name in learnt}
    fit.model.train()
    saved = measure.saved_bytes(lambda: fit.model(**batch))
    fit.model.eval()
    with torch.no_grad():
        for name, buffer in kept.items():
            fit.model.get_buffer(name).copy_(buffer)
    samples = len(batch["labels"])
    return {
        "saved_bytes_per_sample": round(saved / samples),
        "saved_bytes_batch": {"samples": samples},
        "peak_memory_bytes": measure.peak_rss(),
        **measure.environment(),
    }


def _report(metrics: dict[str, Any], out: Path) -> list[str]:
    lines = [coverage_line(metrics)] if metrics["dictionary"] else []
    dev = metrics["dev"]
    lines.append(f"dev        accuracy {dev['accuracy']:.4f}  top-5 {dev['top5']:.4f}  ({dev['n']} images)")
    if metrics["test"]:
        lines.append("test")
        lines += score_lines(metrics["test"])
    return [
        *lines,
        f"learning rate {metrics['learning_rate']:g}, epoch {metrics['best_epoch']} of {metrics['epochs']}, by dev",
        f"{metrics['seconds_per_epoch']:.1f} s an epoch, {metrics['trained_parameters']:,} trained parameters, "
        f"{metrics['saved_bytes_per_sample'] / 2**20:.2f} MiB kept for backward a sample",
        f"model, metrics.json and curve.png are in {out}",
    ]
