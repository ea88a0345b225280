"""What the importers share: arrays and tables from files, features for types that have none, relations back."""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ...data.errors import InputError
from ...ops import hetero_aggregate
from ..adjacency import Adjacency
from ..folder import one_line
from ..hetero import EdgeType, HeteroGraph


def need_folder(folder: Path, files: str) -> None:
    """InputError where there is no such folder; `files` says what is wanted in it."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; pass the one that has {files}")


def read_array(file: IO[bytes] | Path, path: Path, what: str) -> np.ndarray:
    """The next array of an open .npy file, or that of a path.

    Raises InputError for what is damaged, no numbers, or pickled; `what` says what the array is.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except Exception as error:  # a damaged file raises what its first damaged byte leads to
        why = one_line(error)
        raise InputError(f"{path}: holds no array of {what}, or a pickled one, which is not read ({why})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise InputError(f"{path}: must hold an array of numbers as {what}")
    return array


def read_table(path: Path, columns: tuple[int, ...] | None, skip: int, dtype: Any) -> np.ndarray:
    """Columns of a .csv or .csv.gz file of numbers, (rows, columns), without its first `skip` lines.

    Raises InputError for a file that is missing or has something else in it.
    """
    if not path.is_file():
        raise InputError(f"{path}: is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file is a relation without edges
            table = np.loadtxt(path, dtype, None, ",", None, skip, columns, ndmin=2, encoding="utf-8")
    except (OSError, ValueError, EOFError, IndexError, zlib.error) as error:
        raise InputError(f"{path}: must be numbers separated by commas, UTF-8 ({one_line(error)})") from error
    return table if table.size else np.empty((0, len(columns or ())), dtype)


def edges_of(pairs: np.ndarray) -> torch.Tensor:
    """(2, E) of rows (source, target), each edge once."""
    return torch.from_numpy(np.unique(pairs.astype(np.int64, copy=False), axis=0).T.copy())


def with_relations_back(edges: dict[EdgeType, torch.Tensor]) -> dict[EdgeType, torch.Tensor]:
    """The relations, and rev_<name> of each whose ends no other relation joins the other way."""
    both = dict(edges)
    for (source, name, target), pairs in edges.items():
        if source != target and not any((s, t) == (target, source) for s, _, t in edges):
            both[target, f"rev_{name}", source] = pairs.flip(0)
    return both


def fill_features(graph: HeteroGraph) -> HeteroGraph:
    """The same graph, where each type without features has the means of its neighbours', relations side by side.

    Types next to one with features come first, then those next to them.
    Raises InputError for edges that name a node that is not there, and for a type that no features reach.
    """
    adjacency, x = Adjacency(graph), dict(graph.x)
    while missing := [t for t in graph.node_types if t not in x]:
        found = {}
        for node_type in missing:
            into = [edge_type for edge_type in graph.into(node_type) if edge_type[0] in x]
            if into:
                found[node_type] = torch.cat([hetero_aggregate(x[r[0]].float(), adjacency[r]) for r in into], dim=1)
        if not found:
            raise InputError(
                f"node type {missing[0]!r}: has no features, and no relation leads there from a type with some"
            )
        x |= found
    order = {t: x[t] for t in graph.node_types}
    return HeteroGraph(graph.num_nodes, graph.edges, order, graph.y, graph.num_classes, graph.class_names, graph.name)
