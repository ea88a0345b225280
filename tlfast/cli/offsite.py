"""tlfast offsite: two parties tune a model together, and neither sees the other's model or data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError
from .ladder_options import check_test, choose_task, learning_rates, own_options, settings_of_the_user
from .offsite_model import alignment_of, distillation_of, load_named, load_owner, read_secret
from .output import emit, note, on_terminal, quiet_libraries

if TYPE_CHECKING:
    from ..offsite import Bundle, Distillation, Method, TaskSpec
    from ..training import Fit, RunFolder, Settings, Task, TaskData

app = typer.Typer(help="Offsite-tuning between the owner of a model and the owner of data.", no_args_is_help=True)

ADAPTER = "adapter"  # the one folder of a training run that is sent back

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
ModelName = Annotated[str, typer.Option("--model", help='Folder or Hugging Face name of the full model, or "minilm".')]
Secret = Annotated[
    Path | None, typer.Option("--secret", help="A file of the owner's, where others may hold the model; kept private.")
]
Align = Annotated[
    Path | None,
    typer.Option(
        "--align", help="Texts or images of the owner's, to train the last blocks on as the emulator has them."
    ),
]
AlignSteps = Annotated[int | None, typer.Option("--align-steps", min=1, help="Steps of alignment; default: 1000.")]
AlignRate = Annotated[float | None, typer.Option("--align-lr", help="Its learning rate; default: 3e-4.")]


@app.command()
def make(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="A new folder: the bundle, to be sent to the owner of the data.")],
    adapter: Annotated[str, typer.Option(help="How many of the first and of the last blocks are trained.")] = "2,2",
    emulator: Annotated[
        str,
        typer.Option(help="What stands for the blocks between: keep:N, keep:all, svd:RANK, prune:FRACTION, int8, nf4."),
    ] = "keep:2",
    distill: Annotated[
        Path | None,
        typer.Option("--distill", help="Texts (.txt, .tsv, .csv, .jsonl) or a folder of images to distil on."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of distillation; default: 1000.")] = None,
    distill_lr: Annotated[float | None, typer.Option(help="Its learning rate; default: 3e-4.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    secret: Secret = None,
    as_json: Json = False,
) -> None:
    """Owner of the model: write a bundle, which is all that the owner of the data needs."""
    quiet_libraries()
    from .. import offsite

    sizes = _sizes(adapter)
    with settings_of_the_user():
        offsite.Recipe.of(emulator)
    _check_new(out)
    loaded = load_owner(model)
    distillation = distillation_of(loaded, distill, steps, distill_lr, seed)
    try:
        with settings_of_the_user(), steps_of(distillation, "distil", as_json) as progress:
            bundle = offsite.make(
                loaded.model, sizes, emulator, out, loaded.tokenizer, distillation, read_secret(secret), progress
            )
    except FloatingPointError as error:
        raise InputError(f"--distill-lr: {error}") from error
    except KeyboardInterrupt:
        note("interrupted; nothing was kept")
        raise typer.Exit(130) from None
    result = {"out": str(out), "sha256": bundle.sha256, **bundle.manifest["blocks"]}
    result["bytes"] = sum(file["bytes"] for file in bundle.manifest["files"].values())
    sent, middle = bundle.blocks.adapter_places(bundle.blocks.total), list(bundle.blocks.middle)
    made = emulator if distillation is None else f"{emulator}, distilled"
    lines = [
        f"of {bundle.blocks.total} blocks {_ranges(sent)} are sent as they are, and of {_ranges(middle)}: {made}",
        f"bundle {bundle.sha256[:12]}, {result['bytes']:,} bytes, is in {out}",
    ]
    emit(result, lines, as_json)


@app.command()
def train(
    bundle_folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle that the model's owner sent.")],
    train_file: Annotated[Path, typer.Option("--train", help="Training data, as tlfast ladder train reads them.")],
    test_file: Annotated[Path, typer.Option("--test", help="Test data; read once, after selection.")],
    out: Annotated[
        Path, typer.Option(help="Folder of the run; the folder adapter in it, and nothing else, is sent back.")
    ],
    task: Annotated[
        str,
        typer.Option(
            help="sequence-classification, token-classification, image-classification, causal-lm or multiple-choice."
        ),
    ] = "sequence-classification",
    dev_file: Annotated[
        Path | None, typer.Option("--dev", help="Data that select; without it a seeded tenth of the training data.")
    ] = None,
    method: Annotated[str, typer.Option(help="full (the adapter's blocks), lora (on them) or ladder.")] = "full",
    rank: Annotated[int, typer.Option(min=1, max=4096, help="Of LoRA.")] = 8,
    reduction: Annotated[int, typer.Option(min=1, help="Of a ladder: how many times narrower it is.")] = 8,
    text_column: Annotated[str | None, typer.Option(help="Name of the column of texts; default: text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Name of the column of labels; default: label.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Name of the column of second texts.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a block of running text.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[str, typer.Option(help="Learning rate; of several, separated by commas, dev chooses.")] = "1e-4",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Owner of the data: tune on a bundle, which is all that is needed of the model."""
    quiet_libraries()
    from .. import offsite, training
    from ..offsite import tuning

    kind = choose_task(task, task_kinds())
    options = own_options(
        kind.of,
        task,
        text_column=text_column,
        label_column=label_column,
        pair_column=pair_column,
        block_size=block_size,
    )
    settings = training.Settings(epochs, batch_size, learning_rates(lr), seed=seed)
    with settings_of_the_user():
        chosen = offsite.Method(method, rank, 2 * rank, {"reduction": reduction} if method == "ladder" else {})
    check_test(test_file, kind)
    bundle = offsite.Bundle.read(bundle_folder)
    preprocessor = tuning.prepare_tokenizer(bundle)
    fitted = kind.of(tuning.longest_input(bundle, preprocessor), str(bundle_folder), **options)
    with settings_of_the_user():
        fitted, data = training.load_data(fitted, train_file, dev_file, preprocessor, seed)
    spec = tuning.spec_of(fitted, preprocessor)
    identity = {
        "command": "offsite train",
        "bundle_sha256": bundle.sha256,
        "train_sha256": training.file_digest(train_file),
        "dev_sha256": None if dev_file is None else training.file_digest(dev_file),
        "test_sha256": training.file_digest(test_file),
        "task": task,
        **fitted.settings(),
        "method": asdict(chosen),
        "training": asdict(settings),
    }
    run = training.RunFolder(out)
    if (out / ADAPTER).exists() and not (resume and run.finished):
        raise InputError(f"{out}: already has a folder {ADAPTER}; pass another --out")
    try:
        with run.session(identity, resume):
            if not run.finished:
                fit = _fit(bundle, fitted, data, spec, chosen, settings, run, resume, as_json)
                test = fitted.dataset(fitted.read(test_file, labelled=True), preprocessor)
                metrics = training.results(fit, data, test, settings) | _cost(fit, data, settings)
                title = f"{train_file.stem}: {method} on bundle {bundle.sha256[:12]}"
                _write(run, fit, bundle, fitted, preprocessor, spec, chosen, metrics | {"settings": identity}, title)
    except (training.InterruptedTraining, KeyboardInterrupt):
        kept = "run the same command with --resume to go on" if run.has_checkpoint() else "there is nothing to resume"
        note(f"interrupted; {kept}")
        raise typer.Exit(130) from None
    metrics = run.read_metrics()
    emit(metrics, _report(metrics, out), as_json)


@app.command()
def plug(
    model: ModelName,
    adapter: Annotated[Path, typer.Option(help="The adapter that came back, or the run's folder with it inside.")],
    out: Annotated[Path, typer.Option(help="A new folder for the plugged model, as transformers loads it.")],
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle that was sent; an adapter of any other is then refused.")
    ] = None,
    align: Align = None,
    align_steps: AlignSteps = None,
    align_lr: AlignRate = None,
    secret: Secret = None,
    as_json: Json = False,
) -> None:
    """Owner of the model: check what came back, and plug it into the full model."""
    quiet_libraries()
    from .. import offsite

    _check_new(out)
    folder = adapter_folder(adapter)
    opened = offsite.Adapter.open(folder)
    loaded = load_named(model, opened.bundle["model"])
    alignment = alignment_of(loaded, align, align_steps, align_lr, bundle)
    with aligning(alignment, as_json) as progress:
        plugged = offsite.plug(
            loaded.model, folder, out, bundle, read_secret(secret), loaded.tokenizer, alignment, progress
        )
    result = {"out": str(out), "class": type(plugged).__name__, "task": opened.task.name, "method": opened.method.name}
    how = (
        f"transformers.{result['class']}" if opened.method.name != "ladder" else "tlfast.LadderModel, on the full model"
    )
    emit(result, [f"{opened.task.name} by {opened.method.name}, plugged in: {out} (load it as {how})"], as_json)


def adapter_folder(path: Path) -> Path:
    """The folder that was sent: the path itself, or the folder adapter of a training run."""
    inner = path / ADAPTER
    return inner if not (path / "manifest.json").exists() and inner.is_dir() and not inner.is_symlink() else path


def task_kinds() -> dict[str, type[Task]]:
    """The classes of the tasks that a bundle, which has one list of blocks, can be tuned for."""
    from .. import offsite, training

    kinds = training.TASKS | {training.ChoiceTask.name: training.ChoiceTask}
    return {name: kinds[name] for name in offsite.TASKS}


def _sizes(text: str) -> tuple[int, int]:
    try:
        first, last = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--adapter {text!r}: pass two numbers separated by a comma, such as 2,2") from None
    return first, last


def _check_new(out: Path) -> None:
    from ..offsite.folder import check_new

    check_new(out)


@contextmanager
def aligning(alignment: Distillation | None, quiet: bool) -> Iterator[Callable[[float], None]]:
    """Around what aligns: its bar, and what it refuses in one line; after Ctrl-C nothing is kept."""
    try:
        with settings_of_the_user(), steps_of(alignment, "align", quiet) as progress:
            yield progress
    except FloatingPointError as error:
        raise InputError(f"--align-lr: {error}") from error
    except KeyboardInterrupt:
        note("interrupted; nothing was kept")
        raise typer.Exit(130) from None


@contextmanager
def steps_of(distillation: Distillation | None, what: str, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A bar over the steps of distillation or alignment; gives what is called with each step's loss."""
    from tqdm import tqdm

    total = 0 if distillation is None else distillation.steps
    with tqdm(total=total, desc=what, unit="step", disable=quiet or not total or not on_terminal()) as bar:

        def progress(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()

        yield progress


def _fit(
    bundle: Bundle,
    task: Task,
    data: TaskData,
    spec: TaskSpec,
    method: Method,
    settings: Settings,
    run: RunFolder,
    resume: bool,
    quiet: bool,
) -> Fit:
    from ..offsite import tuning

    say = (lambda line: None) if quiet else note
    progress = on_terminal() and not quiet
    return tuning.tune(bundle, task, data, spec, method, settings, run.checkpoints, resume, progress, say)


def _cost(fit: Fit, data: TaskData, settings: Settings) -> dict[str, Any]:
    from .. import training
    from ..bench import measure

    batch = training.typical_batch(data, settings.batch_size)
    device = next(fit.model.parameters()).device
    placed = {name: tensor.to(device) for name, tensor in batch.items()}
    fit.model.train()
    saved = measure.saved_bytes(lambda: fit.model(**placed))
    fit.model.eval()
    shape = training.batch_shape(batch)
    return {
        "saved_bytes_per_sample": round(saved / shape["samples"]),
        "saved_bytes_batch": shape,
        "peak_memory_bytes": measure.peak_rss(),
        **measure.environment(),
    }


def _write(
    run: RunFolder,
    fit: Fit,
    bundle: Bundle,
    task: Task,
    preprocessor: Any,
    spec: TaskSpec,
    method: Method,
    metrics: dict[str, Any],
    title: str,
) -> None:
    from ..offsite import save_adapter
    from ..training.curve import draw_curve

    with run.publish() as folder:
        (folder / ADAPTER).mkdir()
        save_adapter(folder / ADAPTER, fit.model, bundle, spec, method)
        task.save(folder)
        metric = task.scoring(preprocessor).metric
        draw_curve(folder / "curve.png", fit.chosen.history, metric, fit.chosen.best_epoch, title)
        run.write_metrics(folder, metrics)


def _report(metrics: dict[str, Any], out: Path) -> list[str]:
    rows = []
    for part in ("train", "dev", "test"):
        scores = {name: value for name, value in metrics[part].items() if name != "n"}
        figures = "  ".join(f"{n} {v:.4f}" if isinstance(v, float) else f"{n} {v}" for n, v in scores.items())
        rows.append(f"{part:<6}{figures}  ({metrics[part]['n']} examples)")
    return [
        *rows,
        "these are the emulator's scores; the full model's come with the plugged adapter",
        f"learning rate {metrics['learning_rate']:g}, epoch {metrics['best_epoch']} of {metrics['epochs']}, by "
        f"{metrics['selected_by']}; {metrics['trained_parameters']:,} trained parameters",
        f"send back {out / ADAPTER} and nothing else; metrics.json and curve.png in {out} are yours",
    ]


def _ranges(indices: list[int]) -> str:
    """ "0-1, 5, 9-11" of ascending indices."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
