"""OAG-CS as the code of KTN stores it: nodes-<type>.npy and edges-<relation>-to-<target>-from-<source>.csv."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from ...data.errors import InputError
from ..hetero import EdgeType, HeteroGraph
from .files import edges_of, need_folder, read_array, read_table

LABELS = ("L1", "L2", "venue")
# Of these relations the labels are made, so the authors' code leaves them out of the graph.
_LEFT_OUT = re.compile(r"(rev_)?(PF_in_L[01]|AP_write_first)")
_NODES, _EDGES = re.compile(r"nodes-(.+)\.npy"), re.compile(r"edges-(.+)-to-(.+)-from-(.+)\.csv")
_MOST_CLASSES = 1_000_000  # the largest graph of the authors has less than 20,000
_LABELLED = {"paper": LABELS, "author": LABELS[:2], "venue": LABELS[:2]}


def read_oag(folder: Path, labels: str = "L1") -> HeteroGraph:
    """The graph of a folder that Data/main.py of the KTN repository wrote.

    A nodes file holds arrays one after the other: features (nodes, features); of paper, author and venue then the
    classes of L1 (nodes, 50), -1 behind the last, how many classes there are (1,), the split (nodes,), and the same of
    L2 without a split; of paper also those of its venue. Relations between the same two types become one,
    <source>-<target>, each edge once, without those of which the labels are made; rows of features get length 1; a
    node's classes weigh alike. All as the authors' training has it. The split by years and places is not kept.

    labels: "L1", "L2" or "venue" (which papers alone have).
    Raises InputError for files that are missing, damaged, pickled, or do not fit each other.
    """
    if labels not in LABELS:
        raise InputError(f"labels must be one of {', '.join(LABELS)}, not {labels!r}")
    need_folder(folder, "nodes-<type>.npy")
    x, y, classes = {}, {}, set()
    for path in sorted(folder.glob("nodes-*.npy")):
        node_type = _matched(_NODES, path)[0]
        features, weights = _read_nodes(path, node_type, labels)
        x[node_type] = features
        if weights is not None:
            y[node_type] = weights
            classes.add(weights.shape[1])
    if not x:
        raise InputError(f"{folder}: has no nodes-<type>.npy{_about_pickles(folder)}")
    if len(classes) > 1:
        raise InputError(f"{folder}: its types have different numbers of classes of {labels}: {sorted(classes)}")
    edges: dict[EdgeType, list[np.ndarray]] = {}
    for path in sorted(folder.glob("edges-*.csv")):
        relation, target, source = _matched(_EDGES, path)
        if not _LEFT_OUT.fullmatch(relation):
            edges.setdefault((source, f"{source}-{target}", target), []).append(_read_edges(path))
    counts = {t: features.shape[0] for t, features in x.items()}
    joined = {edge_type: edges_of(np.concatenate(parts)) for edge_type, parts in edges.items()}
    graph = HeteroGraph(counts, joined, x, y, classes.pop() if classes else None, name=f"OAG, {labels}")
    graph.check_edges()
    return graph


def _read_nodes(path: Path, node_type: str, labels: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features with rows of length 1, and class weights (nodes, classes) or None."""
    with path.open("rb") as file:
        features = torch.from_numpy(read_array(file, path, "features").astype(np.float32))
        if features.dim() != 2:
            raise InputError(f"{path}: features must be (nodes, features), not {tuple(features.shape)}")
        features = torch.nn.functional.normalize(features, dim=1)
        for kind in _LABELLED.get(node_type, ()):
            listed = read_array(file, path, f"classes of {kind}")
            count = read_array(file, path, f"the number of classes of {kind}")
            if kind == "L1":
                read_array(file, path, "the split")
            if kind == labels:
                return features, _weights(path, listed, count, features.shape[0])
    return features, None


def _weights(path: Path, listed: np.ndarray, count: np.ndarray, nodes: int) -> torch.Tensor:
    """1 at each class that a node's row lists."""
    classes = count.item() if count.size == 1 else 0
    whole = 1 <= classes <= _MOST_CLASSES and classes == int(classes)
    if not whole or listed.ndim != 2 or len(listed) != nodes or listed.max(initial=-1) >= classes:
        raise InputError(
            f"{path}: its classes {listed.shape}, up to {listed.max(initial=-1)}, do not fit its {nodes} nodes and"
            f" {count.tolist()} classes (1 to {_MOST_CLASSES})"
        )
    weights = torch.zeros(nodes, int(classes))
    row, column = np.nonzero(listed >= 0)
    weights[row, listed[row, column].astype(np.int64)] = 1.0
    return weights


def _read_edges(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8", errors="replace") as lines:
        header = lines.readline().strip().split(",")
    if not {"Source", "Target"} <= set(header):
        raise InputError(f"{path}: its first line must name the columns Source and Target, not {','.join(header)[:80]}")
    return read_table(path, (header.index("Source"), header.index("Target")), 1, np.int64)


def _matched(pattern: re.Pattern[str], path: Path) -> tuple[str, ...]:
    found = pattern.fullmatch(path.name)
    if found is None:
        raise InputError(f"{path}: is not named as {pattern.pattern}; rename or remove it")
    return found.groups()


def _about_pickles(folder: Path) -> str:
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".pk", ".pkl", ".pickle")]
    if not pickles:
        return "; pass the folder that Data/main.py of the KTN repository wrote"
    return f", but {pickles[0]}: a pickle runs code and is not read; run Data/main.py of the KTN repository on it first"
