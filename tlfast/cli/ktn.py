"""tlfast ktn: learn labels on one node type of a heterogeneous graph, predict them on another."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data import InputError, format_rows
from .output import emit, note, on_terminal

if TYPE_CHECKING:
    import torch

    from ..graph import Adjacency, HeteroGraph
    from ..ktn.training import KtnFit, KtnSettings
    from ..training import RunFolder

app = typer.Typer(help="Zero-shot transfer between node types of a heterogeneous graph (KTN).", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
GraphFolder = Annotated[Path, typer.Option("--graph", help="A folder with graph.json.")]


@app.command()
def fit(
    graph_folder: GraphFolder,
    source: Annotated[str, typer.Option(help="The node type that has labels.")],
    target: Annotated[str, typer.Option(help="The node type to predict labels for.")],
    out: Annotated[Path, typer.Option(help="Folder for the model, metrics.json, curve.png and schema.png.")],
    hops: Annotated[int, typer.Option(help="Longest metapath between the two, in relations.")] = 1,
    epochs: Annotated[int, typer.Option(help="The most epochs; it may stop earlier.")] = 60,
    hidden: Annotated[int, typer.Option(help="Width of all states.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers of message passing.")] = 2,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    fan_out: Annotated[int, typer.Option(help="The most neighbours a relation that a step matches to.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Labelled nodes a step; 0: the whole graph in one.")] = 0,
    neighbours: Annotated[
        int, typer.Option(help="With --batch-size: edges a node draws from each relation in each hop.")
    ] = 10,
    baselines: Annotated[
        str, typer.Option(help="Train these beside it: none (no transfer), dan, coral, dann, cdan, or all.")
    ] = "",
    more_labels: Annotated[
        Path | None, typer.Option(help="More labels of the target, (nodes,) in an .npy file, to score on as well.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Train on the source's labels; labels of the target, where it has some, are read for scores alone."""
    from ..graph import Adjacency, read_folder
    from ..graph.folder import digest
    from ..ktn.adapting import baseline_names
    from ..ktn.training import KtnSettings
    from ..training import RunFolder, file_digest

    names = baseline_names(baselines)
    if batch_size and names:
        raise InputError("--baselines train on the whole graph; leave them or --batch-size out")
    sizes = {"fan_out": fan_out, "batch_size": batch_size, "neighbours": neighbours}
    settings = KtnSettings(source, target, hops, epochs, hidden, layers, lr, seed=seed, **sizes)
    graph = read_folder(graph_folder)
    adjacency = Adjacency(graph)
    extra = None if more_labels is None else _read_labels(more_labels, graph, source, target)
    run = RunFolder(out)
    identity = {"command": "ktn fit", "graph_sha256": digest(graph), **asdict(settings), "baselines": names}
    identity["more_labels_sha256"] = None if more_labels is None else file_digest(more_labels)
    try:
        with run.session(identity, resume):
            if not run.finished:
                fit_into(run, graph, adjacency, settings, names, extra, show=on_terminal() and not as_json)
    except KeyboardInterrupt:
        kept = "run the same command with --resume to go on" if run.has_checkpoint() else "there is nothing to resume"
        note(f"interrupted; {kept}")
        raise typer.Exit(130) from None
    metrics = run.read_metrics()
    emit(metrics, _report(metrics, out), as_json)


@app.command()
def predict(
    model_folder: Annotated[Path, typer.Option("--model", help="The --out folder of ktn fit.")],
    graph_folder: GraphFolder,
    out: Annotated[Path, typer.Option(help="A .tsv, .csv or .jsonl file: node, label, probability.")],
    as_json: Json = False,
) -> None:
    """Predict a label for every node of the target type, in their order; the graph needs no labels."""
    from ..data.write import check_suffix
    from ..graph import Adjacency, read_folder
    from ..ktn.saved import load_model, predictions
    from ..training import write_whole

    suffix = check_suffix(out)
    graph = read_folder(graph_folder)
    model, settings, config = load_model(model_folder, graph)
    rows = predictions(model.predict(graph, Adjacency(graph))["ktn"], config["class_names"])
    if not rows:
        raise InputError(f"{graph_folder}: has no nodes of the target type {settings.target!r}")
    write_whole(out, format_rows(rows, suffix))
    result = {"predictions": len(rows), "target": settings.target, "out": str(out)}
    emit(result, [f"{len(rows)} predictions for {settings.target} in {out}"], as_json)


@app.command("import")
def import_graph(
    layout: Annotated[str, typer.Option("--format", help="oag, ogb or dblp: whose files they are.")],
    source_folder: Annotated[Path, typer.Option("--from", help="The folder with those files.")],
    out: Annotated[Path, typer.Option(help="A new folder for the graph.")],
    labels: Annotated[str, typer.Option(help="Of oag: L1, L2 or venue.")] = "L1",
    as_json: Json = False,
) -> None:
    """Make a folder with graph.json of OAG-CS as KTN's code stores it, of OGB's raw layout, or of PyG's raw DBLP."""
    from ..graph import importers, save

    readers = {
        "oag": lambda folder: importers.read_oag(folder, labels),
        "ogb": importers.read_ogb,
        "dblp": importers.read_dblp,
    }
    if layout not in readers:
        raise InputError(f"--format {layout!r}: must be one of {', '.join(readers)}")
    if layout != "oag" and labels != "L1":
        raise InputError(f"--labels is for --format oag, not {layout}")
    with _new_folder(out) as staging:
        try:
            graph = readers[layout](source_folder)
        except OSError as error:  # _new_folder would take it for one of --out
            raise InputError(f"{source_folder}: cannot be read ({error})") from error
        save(graph, staging)
    edges = {" ".join(edge_type): pairs.shape[1] for edge_type, pairs in graph.edges.items()}
    labelled = {t: y.shape[0] for t, y in graph.y.items()}
    result = {"out": str(out), "nodes": graph.num_nodes, "edges": edges, "labels": list(labelled)}
    lines = [f"{count:>12,} {t}{' (labels)' if t in labelled else ''}" for t, count in graph.num_nodes.items()]
    lines += [f"{count:>12,} {name}" for name, count in edges.items()]
    emit(result | {"num_classes": graph.num_classes}, [*lines, f"the graph is in {out}"], as_json)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out`, which must not be there or be empty, when the block succeeds."""
    from ..training.folder import writing_to

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; pass another --out")
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-unfinished-", dir=out.parent))
        try:
            yield staging
            staging.chmod(0o755)  # mkdtemp's folders are private
            os.replace(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _read_labels(path: Path, graph: HeteroGraph, source: str, target: str) -> torch.Tensor:
    import torch

    from ..graph.folder import load_array
    from ..ktn.classifier import label_distribution
    from ..ktn.training import source_labels

    labels = torch.from_numpy(load_array(path, path))
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"{path}: must hold whole numbers, not {labels.dtype}")
    if target in graph.num_nodes and labels.shape != (graph.num_nodes[target],):
        raise InputError(f"{path}: must be ({graph.num_nodes[target]},), a label for each {target}, not {labels.shape}")
    rows = label_distribution(labels.to(torch.int64), source_labels(graph, source).shape[1])
    if not bool((rows.sum(1) > 0).any()):
        raise InputError(f"{path}: no {target} has a label; leave --more-labels out")
    return rows


def fit_into(
    run: RunFolder,
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    names: list[str],
    extra: torch.Tensor | None,
    show: bool,
) -> dict[str, Any]:
    """Fit, train the baselines of these names, score all, and leave the results in the run's folder; the metrics."""
    fitted = _fit(graph, adjacency, settings, run, show)
    trained = _baselines(names, graph, adjacency, settings, show)
    metrics = _metrics(fitted, trained, graph, adjacency, settings, extra)
    _write(run, fitted, graph, settings, metrics)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    return metrics


def _fit(graph: HeteroGraph, adjacency: Adjacency, settings: KtnSettings, run: RunFolder, show: bool) -> KtnFit:
    from tqdm import tqdm

    from ..ktn import batches, training
    from ..training.epochs import keep_state, last_state

    def keep(under_way: training.KtnTraining) -> None:
        state = under_way.state_dict()
        keep_state(run.checkpoints, len(state["history"]), state)

    resumed = last_state(run.checkpoints)
    with tqdm(
        initial=len(resumed["history"]) if resumed else 0, total=settings.epochs, desc="epoch", disable=not show
    ) as bar:

        def progress(entry: dict[str, float]) -> None:
            bar.set_postfix_str(f"loss {entry['loss']:.4f}, dev {entry['dev_accuracy']:.4f}")
            bar.update()

        fit_by = batches.fit_batches if settings.batch_size else training.fit
        return fit_by(graph, adjacency, settings, progress, keep, resumed)


def _baselines(
    names: list[str], graph: HeteroGraph, adjacency: Adjacency, settings: KtnSettings, show: bool
) -> dict[str, torch.Tensor]:
    """What the baselines that learn predict for the target, by the names metrics.json has."""
    from tqdm import tqdm

    from ..ktn.adapting import fit_adapted

    found = {}
    for name in names:
        with tqdm(total=settings.epochs, desc=name, disable=not show) as bar:
            predicted = fit_adapted(name, graph, adjacency, settings, bar.update)
        found["no_transfer" if name == "none" else name] = predicted
    return found


def _metrics(
    fitted: KtnFit,
    trained: dict[str, torch.Tensor],
    graph: HeteroGraph,
    adjacency: Adjacency,
    settings: KtnSettings,
    extra: torch.Tensor | None,
) -> dict[str, Any]:
    from ..bench import measure
    from ..ktn import baselines, scores, training
    from ..ktn.metapaths import describe

    predicted = fitted.model.predict(graph, adjacency)
    result = training.score_all(fitted, graph, predicted)
    labels = training.source_labels(graph, settings.source)
    paths = fitted.model.transfer.paths
    others = {
        "vote": baselines.vote(labels, adjacency, paths),
        "label_propagation": baselines.propagate(labels, adjacency, settings.source, settings.target),
        **trained,
    }
    truth = training.target_labels(graph, settings.target, labels.shape[1])
    if truth is not None:
        result["target"] |= {name: scores(found, truth) for name, found in others.items()}
    if extra is not None:
        named = {"raw": predicted["raw"], "ktn": predicted["ktn"], **others}
        result["more_labels"] = {name: scores(found, extra) for name, found in named.items()}
    return result | {
        "metapaths": [describe(path) for path in paths],
        "settings": asdict(settings),
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "seconds_per_epoch": fitted.seconds_per_epoch,
        "saved_bytes_per_sample": _saved_bytes(fitted, graph, adjacency, settings),
        "peak_memory_bytes": measure.peak_rss(),
        **measure.environment(),
    }


def _saved_bytes(fitted: KtnFit, graph: HeteroGraph, adjacency: Adjacency, settings: KtnSettings) -> int:
    """What a training forward keeps: for each node of the graph, or for each labelled node of a sampled batch."""
    from ..bench import measure
    from ..ktn import batches, training

    if not settings.batch_size:
        saved = measure.saved_bytes(lambda: fitted.model.gnn(graph.x, adjacency))
        return round(saved / max(sum(graph.num_nodes.values()), 1))
    labels = training.source_labels(graph, settings.source)
    batch = next(iter(batches.training_batches(graph, adjacency, settings, fitted.model, fitted.train)))
    saved = measure.saved_bytes(lambda: batches.batch_losses(fitted.model, batch, labels))
    return round(saved / batch.sample.seeds)


def _write(run: RunFolder, fitted: KtnFit, graph: HeteroGraph, settings: KtnSettings, metrics: dict[str, Any]) -> None:
    from ..ktn.metapaths import describe
    from ..ktn.saved import save_model
    from ..training.curve import draw_curve
    from ..training.schema import draw_schema

    history = [
        {"epoch": entry["epoch"], "loss": entry["loss"], "eval_accuracy": entry["dev_accuracy"]}
        for entry in fitted.history
    ]
    with run.publish() as folder:
        save_model(fitted.model, graph, settings, folder)
        title = f"{graph.name}: {settings.source} to {settings.target}"
        draw_curve(folder / "curve.png", history, "accuracy", fitted.best_epoch, title)
        edges = {edge_type: pairs.shape[1] for edge_type, pairs in graph.edges.items()}
        paths = [(path, describe(path)) for path in fitted.model.transfer.paths]
        draw_schema(folder / "schema.png", graph.num_nodes, edges, paths, settings.source, settings.target)
        run.write_metrics(folder, metrics)


def _report(metrics: dict[str, Any], out: Path) -> list[str]:
    def line(name: str, found: dict[str, float]) -> str:
        return f"{name:<32}" + "  ".join(f"{key} {value:.4f}" for key, value in found.items())

    settings = metrics["settings"]
    rows = [line(f"{settings['source']} (dev)", metrics["source"])]
    for part, title in (("target", settings["target"]), ("more_labels", "more labels")):
        rows += [line(f"{title}, {name}", found) for name, found in metrics.get(part, {}).items()]
    return [
        *rows,
        f"metapaths: {'; '.join(metrics['metapaths'])}",
        f"epoch {metrics['best_epoch']} of {metrics['epochs']}, {metrics['seconds_per_epoch']:.2f} s an epoch",
        f"model, metrics.json, curve.png and schema.png are in {out}",
    ]
