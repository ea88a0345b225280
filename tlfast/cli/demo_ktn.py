"""tlfast demo ktn: zero-shot transfer between node types on a graph of the installed Python packages."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .demo_folder import METRICS, demo_folder
from .ktn import fit_into
from .output import emit, note, on_terminal

if TYPE_CHECKING:
    from ..graph import Adjacency, HeteroGraph

SOURCE, TARGETS = "function", {"class": 1, "module": 2}  # hops to each
BASELINES, SEED = ["none", "dan"], 0
GRAPH, REPORT = "graph", "report.md"
TITLE = "Which package is a class or a module of? Learned on functions, by KTN and by simpler ways"
WAYS = {
    "raw": "raw (the same network, no transfer at the end)",
    "no_transfer": "trained without transfer",
    "dan": "DAN",
    "vote": "vote of the neighbours",
    "label_propagation": "label propagation",
    "ktn": "KTN",
}


def run(out: Path, as_json: bool) -> None:
    """Make the graph, fit both targets, and leave graph, models, pictures and report in `out`."""
    with demo_folder(out, TITLE, (GRAPH, *TARGETS, REPORT)) as staging:
        metrics = _run(staging, out, quiet=as_json)
    lines = [
        TITLE,
        "",
        *_table(metrics),
        "",
        f"{REPORT}, {METRICS}, the graph and a model for each target are in {out}",
    ]
    emit(metrics, lines, as_json)


def _run(staging: Path, out: Path, quiet: bool) -> dict[str, Any]:
    from ..bench import measure
    from ..graph import Adjacency, save
    from ..training import RunFolder

    start = time.perf_counter()
    if not quiet:
        note("parsing the sources of installed packages")
    graph = _graph()
    save(graph, staging / GRAPH)
    adjacency = Adjacency(graph)
    fits = {target: _fit(staging / target, graph, adjacency, target, quiet) for target in TARGETS}
    metrics = {
        "title": TITLE,
        "families": graph.class_names,
        "nodes": graph.num_nodes,
        "edges": adjacency.num_edges,
        "source": fits["class"]["source"],
        "targets": {target: found["target"] for target, found in fits.items()},
        "examples": {t: int((y >= 0).sum()) for t, y in graph.y.items()},
        "metapaths": {target: found["metapaths"] for target, found in fits.items()},
        "seconds": time.perf_counter() - start,
        "peak_memory_bytes": measure.peak_rss(),
        **measure.environment(),
    }
    (staging / REPORT).write_text(_report(metrics, out), encoding="utf-8")
    RunFolder(out).write_metrics(staging, metrics)
    return metrics


def _fit(folder: Path, graph: HeteroGraph, adjacency: Adjacency, target: str, quiet: bool) -> dict[str, Any]:
    from ..ktn.training import KtnSettings
    from ..training import RunFolder

    if not quiet:
        note(f"from {SOURCE} to {target}: KTN, then {' and '.join(WAYS[n] for n in ('no_transfer', 'dan'))}")
    folder.mkdir()
    settings = KtnSettings(SOURCE, target, TARGETS[target], seed=SEED)
    return fit_into(RunFolder(folder), graph, adjacency, settings, BASELINES, None, show=on_terminal() and not quiet)


def _graph() -> HeteroGraph:
    """Functions of half of the modules have labels; classes and modules have them in the other half, for scores."""
    import numpy as np
    import torch

    from ..data.python_code import read_code
    from ..graph import HeteroGraph

    code = read_code(seed=SEED)
    modules = len(code.names["module"])
    known = np.zeros(modules, dtype=bool)
    known[np.random.default_rng(SEED).permutation(modules)[: modules // 2]] = True
    y = {}
    for node_type, labels in code.family.items():
        of_a_known = known[code.module[node_type]]
        shown = of_a_known if node_type == SOURCE else ~of_a_known
        y[node_type] = torch.from_numpy(np.where(shown, labels, -1))
    edges = {relation: torch.from_numpy(pairs) for relation, pairs in code.edges.items()}
    x = {node_type: torch.from_numpy(features) for node_type, features in code.x.items()}
    counts = {node_type: len(names) for node_type, names in code.names.items()}
    return HeteroGraph(counts, edges, x, y, class_names=list(code.families), name="installed Python packages")


def _table(metrics: dict[str, Any]) -> list[str]:
    """Accuracy of each way on each target, as lines of a Markdown table."""
    heads = [f"{target} ({metrics['examples'][target]:,})" for target in TARGETS]
    rows = [["accuracy", *heads], ["---", *(["---:"] * len(heads))]]
    rows += [
        [title, *(f"{100 * metrics['targets'][target][way]['accuracy']:.1f} %" for target in TARGETS)]
        for way, title in WAYS.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [*lines, "", f"functions themselves (dev): {100 * metrics['source']['accuracy']:.1f} %"]


def _report(metrics: dict[str, Any], out: Path) -> str:
    nodes = ", ".join(f"{count:,} {node_type}" for node_type, count in metrics["nodes"].items())
    table = "\n".join(_table(metrics))
    return f"""# {TITLE}

{table}

![The graph, and the way from classes to functions](class/schema.png)

- The graph: {nodes}, {metrics["edges"]:,} edges, from the installed sources of {", ".join(metrics["families"])}.
  A module defines its classes and functions, a class has its methods, a function mentions words. Names of packages are
  left out.
- {metrics["examples"][SOURCE]:,} functions have a label, those of half of the modules. Classes and modules are scored
  in the other half: no neighbour of theirs has a label, so a vote can only guess; what is known has to come by words.
- The settings are the defaults of `tlfast ktn fit`. The labels of classes and modules are read for these scores alone.
- Measured on {metrics["machine"]["cpu"]}, {metrics["machine"]["cores"]} cores, in {metrics["seconds"]:.0f} s.

Again: `tlfast ktn fit --graph {out / GRAPH} --source {SOURCE} --target module --hops 2 --out my-ktn`
"""
