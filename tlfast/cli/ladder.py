"""tlfast ladder: train a ladder on texts, tags, images or running text, score it, predict with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError
from .backbone import LoadedBackbone, freeze_loaded, load_backbone
from .ladder_cache import on_cache, storage_of
from .ladder_options import check_test, ladder_config, learning_rates, own_options, settings_of_the_user, task_kind
from .output import emit, note, on_terminal, quiet_libraries

if TYPE_CHECKING:
    from ..backbone import FrozenBackbone
    from ..ladder import LadderConfig, LadderModel
    from ..training import Fit, RunFolder, Settings, Task, TaskData
    from ..training.evaluation import LabelledDataset

app = typer.Typer(help="Ladder side-tuning of a frozen model.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
ModelFolder = Annotated[Path, typer.Option("--model", help="The --out folder of a training run.")]
DataFile = Annotated[Path, typer.Option("--data", help="A file, or a folder of images, as in training.")]
OtherBackbone = Annotated[
    str | None, typer.Option("--backbone", help="The backbone, where it is not where it was in training.")
]


@app.command()
def train(
    backbone: Annotated[str, typer.Option(help='Folder or Hugging Face name of the frozen model, or "minilm".')],
    train_file: Annotated[
        Path,
        typer.Option(
            "--train",
            help="Training data: .tsv, .csv or .jsonl with a header; for token-classification a CoNLL file; for "
            "image-classification a folder with one for each class; for causal-lm also .txt.",
        ),
    ],
    test_file: Annotated[Path, typer.Option("--test", help="Test data; read once, after selection.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, metrics.json, curve.png and checkpoints.")],
    task: Annotated[
        str,
        typer.Option(
            help="sequence-classification (which covers regression and --multi-label), token-classification, "
            "image-classification, causal-lm or seq2seq-lm."
        ),
    ] = "sequence-classification",
    dev_file: Annotated[
        Path | None, typer.Option("--dev", help="Data that select; without it a seeded tenth of the training data.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Name of the column of texts; default: text.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Name of the column of labels, or of texts to write; default: label.")
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(help="Name of the column of second texts; default: text_pair, where there is one.")
    ] = None,
    multi_label: Annotated[
        bool, typer.Option("--multi-label", help='A row has any number of labels, separated by "|".')
    ] = False,
    token_column: Annotated[
        int | None, typer.Option(help="Column of words in a CoNLL file, from 0; default: the first.")
    ] = None,
    tag_column: Annotated[
        int | None, typer.Option(help="Column of tags in a CoNLL file, negative from the end; default: the last.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Tokens of a block of running text; default: 512, or the model's most.")
    ] = None,
    reduction: Annotated[int, typer.Option(min=1, help="The side network is this many times narrower.")] = 8,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[str, typer.Option(help="Learning rate; of several, separated by commas, dev chooses.")] = "1e-3",
    average: Annotated[
        float,
        typer.Option(
            help="Dev judges, and the run keeps, averages of the weights over the last tenth of the steps, but at most "
            "1 / (1 - AVERAGE) of them (0.998 suits most); 0: the weights themselves."
        ),
    ] = 0.0,
    layers: Annotated[str, typer.Option(help='Blocks with a rung: "all" or indices separated by commas.')] = "all",
    decoder_layers: Annotated[
        str | None, typer.Option(help="The same for the decoder of an encoder-decoder; default: as --layers.")
    ] = None,
    init: Annotated[str, typer.Option(help="How the side network starts: prune, pca or random.")] = "prune",
    dropout: Annotated[float | None, typer.Option(help="Of the side network; default: the backbone's own.")] = None,
    tap_storage: Annotated[
        str,
        typer.Option(
            help="How the backbone's states are kept for the backward pass: keep, int8, project, offload (from a GPU "
            "to the host) or stream (not at all: the backbone runs twice)."
        ),
    ] = "keep",
    tap_dim: Annotated[
        int | None, typer.Option(min=1, help="To how many numbers a token --tap-storage project reduces; default: 96.")
    ] = None,
    side_precision: Annotated[
        str, typer.Option(help="Of the side network's products: fp32, or bf16 as under autocast, faster with AMX.")
    ] = "fp32",
    precision: Annotated[
        str | None,
        typer.Option(help="Of the frozen weights: fp32 (default), bf16, int8 or nf4; a prepared folder has its own."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps what the frozen model gives for each example, so that it runs once and not every "
            "epoch; filled here, and read by every later run on the same model and data."
        ),
    ] = None,
    cache_storage: Annotated[
        str | None, typer.Option(help="exact (default) or int8: half of bf16's disk space, a quarter of fp32's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train a ladder; dev selects epoch and learning rate, then the test file is read.

    torchrun --nproc-per-node 2 --no-python tlfast ladder train ... shares each batch between two processes.
    """
    quiet_libraries()
    from .. import training
    from ..training import processes

    kind = task_kind(task)
    options = own_options(
        kind.of,
        kind.name,
        text_column=text_column,
        label_column=label_column,
        pair_column=pair_column,
        multi_label=multi_label or None,
        token_column=token_column,
        tag_column=tag_column,
        block_size=block_size,
    )
    rates = learning_rates(lr)
    config = ladder_config(reduction, layers, decoder_layers, init, dropout, tap_storage, tap_dim, side_precision)
    check_test(test_file, kind)
    storage = storage_of(cache, cache_storage)
    with settings_of_the_user():
        settings = training.Settings(epochs, batch_size, rates, seed=seed, average=average or None)
    loaded = _load_backbone(backbone, kind)
    frozen = freeze_loaded(loaded, precision)
    with settings_of_the_user():  # a tokenizer that cannot pad
        fitted, data = training.load_data(
            kind.of(loaded.max_length, loaded.name, **options), train_file, dev_file, loaded.tokenizer, seed
        )
    _note_truncated(train_file, data.train.truncated, loaded.max_length)
    identity = {
        "command": "ladder train",
        "backbone": loaded.name,
        "fingerprint": frozen.fingerprint(),
        "precision": frozen.precision,
        "train_sha256": training.file_digest(train_file),
        "dev_sha256": None if dev_file is None else training.file_digest(dev_file),
        "task": kind.name,
        **fitted.settings(),
        "ladder": config.to_dict(),
        "training": asdict(settings),
    } | ({} if cache is None else {"cache_storage": storage})
    test_digest = training.file_digest(test_file)
    run = training.RunFolder(out)
    if resume and run.finished and run.read_metrics().get("test_sha256") != test_digest:
        raise InputError(f"{out}: is finished, with another test file; score {test_file} by tlfast ladder eval")
    try:
        with processes.together(), run.session(identity, resume) if processes.is_first() else nullcontext():
            processes.wait()  # the folder is claimed
            if not run.finished:
                quiet = as_json or not processes.is_first()
                make = _ladder_of(frozen, config, fitted)
                seen, kept = data, dict[str, Any]()
                if cache is not None:
                    seen, kept = on_cache(make(), data, fitted, loaded, cache, storage, quiet)
                fit = _fit(make, data, seen, settings, run, resume, quiet)
                if not processes.is_first():
                    return
                test = _read_test(fitted, test_file, loaded)
                metrics = training.results(fit, seen, test, settings) | kept
                metrics |= _cost(fit, data, settings) | {"settings": identity, "test_sha256": test_digest}
                title = f"{train_file.stem}: ladder on {backbone}, reduction {reduction}"
                training.write_results(run, fit, fitted, loaded.tokenizer, metrics, title)
            first = processes.is_first()
    except (training.InterruptedTraining, KeyboardInterrupt):
        note(f"interrupted; {_way_on(run, cache)}")
        raise typer.Exit(130) from None
    if first:
        metrics = run.read_metrics()
        emit(metrics, _report(metrics, out), as_json)


@app.command("eval")
def evaluate(
    model_folder: ModelFolder, data_file: DataFile, backbone: OtherBackbone = None, as_json: Json = False
) -> None:
    """Score a trained ladder on data with labels."""
    quiet_libraries()
    from .. import training

    task = training.load_task(model_folder)
    model, loaded = _load(model_folder, task, backbone)
    dataset = task.dataset(task.read(data_file, labelled=True), loaded.tokenizer)
    _note_truncated(data_file, dataset.truncated, task.max_length)
    collate, scoring = task.collate(loaded.tokenizer), task.scoring(loaded.tokenizer)
    scores = training.evaluate_test(model, dataset, collate, scoring)
    emit(scores, ["  ".join(f"{name} {_figure(value)}" for name, value in scores.items())], as_json)


@app.command()
def predict(
    model_folder: ModelFolder,
    data_file: DataFile,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .tsv, .csv or .jsonl file; of tags a CoNLL file (.conll, .tsv or .txt) or .jsonl; default: "
            "standard output."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The most tokens of a text that is written; default: 64.")
    ] = None,
    backbone: OtherBackbone = None,
    as_json: Json = False,
) -> None:
    """Predict a label, a number, tags or a text for everything in a file, in its order; the file needs no labels."""
    quiet_libraries()
    from .. import training

    task = training.load_task(model_folder)
    options = own_options(task.predict, task.name, max_new_tokens=max_new_tokens)
    suffix = task.suffixes[0] if out is None else task.check_out(out)
    model, loaded = _load(model_folder, task, backbone)
    rows, cut = task.predict(model, data_file, loaded.tokenizer, **options)
    _note_truncated(data_file, cut, task.max_length)
    if out is not None:
        training.write_whole(out, task.format(rows, suffix))
        emit({"predictions": len(rows), "out": str(out)}, [f"{len(rows)} predictions in {out}"], as_json)
    else:
        lines = [] if as_json else task.format(rows, suffix).removesuffix("\n").split("\n")
        emit({"predictions": rows}, lines, as_json)


def _load_backbone(name: str, kind: type[Task]) -> LoadedBackbone:
    return load_backbone(name, kind.model_class, kind.preprocessor_class, **kind.preprocessor_settings)


def _ladder_of(frozen: FrozenBackbone, config: LadderConfig, task: Task) -> Callable[..., LadderModel]:
    """What makes the ladder. A task, reduction or layers that do not fit the backbone are seen before anything runs."""
    from ..ladder import LadderModel

    make = functools.partial(
        LadderModel,
        frozen,
        task=task.name,
        num_labels=task.num_labels,
        config=config,
        problem_type=task.problem_type,
    )
    with settings_of_the_user():
        make()
    return make


def _fit(
    make: Callable[..., LadderModel],
    data: TaskData,
    seen: TaskData,
    settings: Settings,
    run: RunFolder,
    resume: bool,
    quiet: bool,
) -> Fit:
    """seen: the data as the model trains on them, data: as its backbone reads them."""
    from .. import training

    def make_model() -> LadderModel:
        return make(calibration=training.calibration_batches(data, settings.seed))

    progress = on_terminal() and not quiet
    return training.fit(make_model, seen, settings, run.checkpoints, resume, progress, _silent if quiet else note)


def _read_test(task: Task, path: Path, loaded: LoadedBackbone) -> LabelledDataset:
    """The test data; what is wrong with them costs no training, which a corrected file and --resume go on from."""
    try:
        test = task.dataset(task.read(path, labelled=True), loaded.tokenizer)
    except InputError as error:
        raise InputError(f"{error}; training is kept: mend the test file and add --resume") from error
    _note_truncated(path, test.truncated, task.max_length)
    return test


def _cost(fit: Fit, data: TaskData, settings: Settings) -> dict[str, Any]:
    """What training took: bytes kept for the backward pass, peak memory; and where it ran."""
    from .. import training
    from ..bench import measure

    batch = training.typical_batch(data, settings.batch_size)
    shape = training.batch_shape(batch)
    device = next(fit.model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    fit.model.train()
    saved = measure.saved_bytes(lambda: fit.model(**batch))
    return {
        "saved_bytes_per_sample": round(saved / shape["samples"]),
        "saved_bytes_batch": shape,
        "peak_memory_bytes": measure.peak_rss(),
        **measure.environment(),
    }


def _load(folder: Path, task: Task, backbone: str | None) -> tuple[LadderModel, LoadedBackbone]:
    """A trained ladder on its backbone."""
    import torch

    from ..ladder import LadderModel

    loaded = _load_backbone(backbone or task.backbone, type(task))
    with settings_of_the_user():  # a damaged folder, or weights that are not those of training
        model = LadderModel.from_pretrained(folder, backbone=loaded.model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), loaded


def _way_on(run: RunFolder, cache: Path | None) -> str:
    if run.has_checkpoint():
        return "run the same command with --resume to go on"
    return "there is nothing to resume" if cache is None else f"the same command goes on with what is in {cache}"


def _silent(line: str) -> None:
    """--json: nothing beside the object."""


def _note_truncated(path: Path, count: int, max_length: int) -> None:
    if count:
        note(f"{path}: {count} texts are longer than the model's {max_length} tokens and were cut")


def _figure(value: float | int | None) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _size(shape: dict[str, int]) -> str:
    return f"{shape['tokens']} tokens" if "tokens" in shape else f"{shape['height']} x {shape['width']} pixels"


def _report(metrics: dict[str, Any], out: Path) -> list[str]:
    rows = []
    for part in ("train", "dev", "test"):
        scores = {name: value for name, value in metrics[part].items() if name != "n"}
        figures = "  ".join(f"{name} {_figure(value)}" for name, value in scores.items())
        rows.append(f"{part:<6}{figures}  ({metrics[part]['n']} examples)")
    kept = metrics["saved_bytes_batch"]
    return [
        *rows,
        f"learning rate {metrics['learning_rate']:g}, epoch {metrics['best_epoch']} of {metrics['epochs']}, "
        f"by {metrics['selected_by']}",
        f"{metrics['seconds_per_epoch']:.1f} s an epoch, {metrics['trained_parameters']:,} trained parameters, "
        f"{metrics['saved_bytes_per_sample'] / 2**20:.2f} MiB kept for backward a sample of {_size(kept)}",
        f"model, metrics.json and curve.png are in {out}",
    ]
