"""tlfast offsite audit and eval: what a bundle gives away, and what the plugged adapter is worth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError
from .ladder_options import check_test, learning_rates, own_options
from .offsite import Align, AlignRate, AlignSteps, Json, ModelName, Secret, adapter_folder, aligning, app, task_kinds
from .offsite_model import alignment_of, load_named, plain_batches, read_secret
from .output import emit, quiet_libraries

if TYPE_CHECKING:
    from ..offsite import Adapter
    from ..offsite.audit import Audit
    from ..offsite.comparison import Comparison

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle.")]
_AUDIT, _PICTURE = "audit.json", "audit.png"


@app.command("audit")
def audit_bundle(
    bundle_folder: BundleFolder,
    model: ModelName,
    max_verbatim: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 1 where a larger share of the middle's matrices is sent.")
    ] = 1.0,
    data: Annotated[
        Path | None, typer.Option(help="Texts or images, on which the untuned emulator is compared with the model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help=f"A new folder for {_AUDIT} and {_PICTURE}.")] = None,
    secret: Secret = None,
    as_json: Json = False,
) -> None:
    """Owner of the model: what leaves the house with a bundle, before it does."""
    quiet_libraries()
    from .. import offsite
    from ..offsite.audit import audit, fidelity
    from ..offsite.folder import check_new

    if out is not None:
        check_new(out)
    bundle = offsite.Bundle.read(bundle_folder)
    loaded = load_named(model, bundle.manifest["model"])
    found = audit(bundle, loaded.model, read_secret(secret))
    result = found.to_dict()
    if data is not None:
        result["untuned"] = fidelity(bundle, loaded.model, plain_batches(loaded, data))
    if out is not None:
        _write_audit(out, found, result)
    emit(result, [*_audit_lines(found), *(f"{k} {v:.4f}" for k, v in result.get("untuned", {}).items())], as_json)
    if found.revealed_matrices > max_verbatim:
        typer.echo(
            f"refused: {100 * found.revealed_matrices:.1f} % of the middle's matrices would be sent to the bit or as "
            f"good, above --max-verbatim {max_verbatim:g}",
            err=True,
        )
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    model: ModelName,
    bundle_folder: Annotated[Path, typer.Option("--bundle", help="The bundle that was sent.")],
    adapter: Annotated[Path, typer.Option(help="The adapter that came back, or the run's folder with it inside.")],
    test_file: Annotated[Path, typer.Option("--test", help="Test data, as in training.")],
    train_file: Annotated[
        Path | None, typer.Option("--train", help="Training data: the same blocks are tuned in the full model too.")
    ] = None,
    dev_file: Annotated[Path | None, typer.Option("--dev", help="Data that select for --train.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Name of the column of texts; default: text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Name of the column of labels; default: label.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Name of the column of second texts.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a block of running text.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of --train.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Of --train.")] = 32,
    lr: Annotated[str, typer.Option(help="Of --train.")] = "1e-4",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    align: Align = None,
    align_steps: AlignSteps = None,
    align_lr: AlignRate = None,
    secret: Secret = None,
    as_json: Json = False,
) -> None:
    """Compare zero-shot, tuned emulator, plug-in and (with --train) full tuning on one test set."""
    quiet_libraries()
    from .. import offsite, training
    from ..offsite import comparison, tuning

    bundle = offsite.Bundle.read(bundle_folder)
    opened = offsite.Adapter.open(adapter_folder(adapter))
    kind = task_kinds()[opened.task.name]
    check_test(test_file, kind)
    options = own_options(
        kind.of, kind.name, text_column=text_column, label_column=label_column, pair_column=pair_column,
        block_size=block_size,
    )  # fmt: skip
    settings = training.Settings(epochs, batch_size, learning_rates(lr), seed=seed)
    preprocessor = tuning.prepare_tokenizer(bundle)
    task = _with_labels(kind.of(tuning.longest_input(bundle, preprocessor), str(bundle_folder), **options), opened)
    test = task.dataset(task.read(test_file, labelled=True), preprocessor)
    loaded = load_named(model, bundle.manifest["model"])
    full, alignment = loaded.model, alignment_of(loaded, align, align_steps, align_lr, bundle_folder)
    with aligning(alignment, as_json) as progress:
        models = tuning.stages(full, bundle, opened, read_secret(secret), alignment, progress)
    if train_file is not None:
        _, data = training.load_data(task, train_file, dev_file, preprocessor, seed)
        models[comparison.FULL] = tuning.tune_full(full, bundle, opened, task, data, settings)
    found = comparison.compare(models, test, task.collate(preprocessor), task.scoring(preprocessor), seed)
    emit(found.to_dict() | {"n": len(test)}, _comparison_lines(found, len(test)), as_json)


def _with_labels(task: Any, adapter: Adapter) -> Any:
    """The task with the classes that the adapter was trained for."""
    from ..data import Labels, LabelSets

    if adapter.task.labels is None:
        return task
    names = adapter.task.label_names or ()
    if adapter.task.problem_type == "multi_label_classification":
        return replace(task, labels=LabelSets(names), multi_label=True)
    if adapter.task.name == "token-classification":
        return replace(task, labels=Labels(names))
    if not names and adapter.task.problem_type != "regression":
        raise InputError(f"{adapter.folder}: does not name its classes, so that no labels can be read for it")
    return replace(task, labels=Labels(names))


def _write_audit(out: Path, found: Audit, result: dict[str, Any]) -> None:
    import json

    from ..offsite.audit_picture import draw_audit
    from ..offsite.folder import new_folder

    with new_folder(out) as folder:
        (folder / _AUDIT).write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draw_audit(folder / _PICTURE, found)


def _audit_lines(found: Audit) -> list[str]:
    """A row for each matrix of the middle's blocks, then the shares and what they mean."""
    rows = [f"{'tensor of the middle':<52}{'nearest in the model':<52}{'cosine':>8}  equal"]
    for tensor in found.findings:
        if tensor.part == "middle" and len(tensor.shape) > 1:
            names = f"{tensor.name[-50:]:<52}{tensor.nearest[-50:]:<52}"
            rows.append(f"{names}{tensor.cosine:>8.4f}  {100 * tensor.equal / max(1, tensor.originals):.1f} %")
    verbatim, revealed = found.verbatim_matrices, found.revealed_matrices
    meaning = "the rest is not, or in another form"
    if revealed > max(0.9, verbatim):
        meaning = f"{found.recipe} hides nothing of them: what is sent is as good as the original"
    elif revealed > 0.9:
        meaning = "this hides nothing of them"
    return [
        *rows,
        f"{100 * verbatim:.1f} % of the middle's matrices are sent to the bit, {100 * revealed:.1f} % to the bit or as "
        f"good (cosine of at least 0.99): {meaning}",
    ]


def _comparison_lines(found: Comparison, count: int) -> list[str]:
    rows = [f"{found.metric} on {count} examples, 95 % intervals by the bootstrap"]
    for name, score in found.scores.items():
        low, high = found.intervals[name]
        rows.append(f"{name:<12}{score:.4f}  ({low:.4f} to {high:.4f})")
    for name, (gap, low, high) in found.gaps.items():
        rows.append(f"plug-in minus {name}: {gap:+.4f}  ({low:+.4f} to {high:+.4f})")
    says = {True: "holds", False: "does not hold", None: "not seen: the interval contains 0"}
    return rows + [f"{promise}: {says[held]}" for promise, held in found.promises.items()]


__all__ = ["audit_bundle", "evaluate"]
