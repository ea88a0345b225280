"""Heterogeneous graphs in OGB's raw layout, such as ogbn-mag: folders of .csv.gz files."""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from ...data.errors import InputError
from ..folder import one_line
from ..hetero import EdgeType, HeteroGraph
from .files import edges_of, fill_features, need_folder, read_table, with_relations_back


def read_ogb(folder: Path) -> HeteroGraph:
    """The graph of a folder with raw/ (or of that itself), which has

    num-node-dict.csv.gz: a line of types and a line of how many nodes each has; triplet-type-list.csv.gz: source,
    relation, target in each line; relations/<source>___<relation>___<target>/edge.csv.gz: source and target of each
    edge; node-feat/<type>/node-feat.csv.gz and node-label/<type>/node-label.csv.gz, both optional: a line for each
    node, labels of one column whole numbers (nan: none), of several 0 or 1.

    Beside raw/, mapping/labelidx2*.csv.gz may name the classes: a header, then index and name in each line. Each edge
    counts once; each relation that has none the other way gets rev_<relation>; types without features get the means of
    their neighbours'.
    Raises InputError for files that are missing, damaged, or do not fit each other.
    """
    need_folder(folder, "raw/num-node-dict.csv.gz")
    raw = folder / "raw" if (folder / "raw").is_dir() else folder
    types, counts = _rows(raw / "num-node-dict.csv.gz", 2)
    if len(types) != len(counts) or not all(count.isdecimal() and len(count) < 19 for count in counts):
        raise InputError(
            f"{raw / 'num-node-dict.csv.gz'}: must be a line of types and a line of their numbers of nodes"
        )
    if len(set(types)) != len(types):
        raise InputError(f"{raw / 'num-node-dict.csv.gz'}: names a type twice in {types}; rename one")
    _check_names(raw / "num-node-dict.csv.gz", types)
    num_nodes = dict(zip(types, map(int, counts), strict=True))
    edges: dict[EdgeType, torch.Tensor] = {}
    for triplet in _rows(raw / "triplet-type-list.csv.gz", None):
        if len(triplet) != 3:
            raise InputError(
                f"{raw / 'triplet-type-list.csv.gz'}: has {triplet} where source, relation, target must be"
            )
        _check_names(raw / "triplet-type-list.csv.gz", triplet)
        path = raw / "relations" / "___".join(triplet) / "edge.csv.gz"
        edges[triplet[0], triplet[1], triplet[2]] = edges_of(read_table(path, (0, 1), 0, np.int64))
    x, y = {}, {}
    for t in types:
        features, labels = (raw / f"node-{kind}" / t / f"node-{kind}.csv.gz" for kind in ("feat", "label"))
        if features.is_file():
            x[t] = torch.from_numpy(read_table(features, None, 0, np.float32))
        if labels.is_file():
            y[t] = _labels(labels, read_table(labels, None, 0, np.float64))
    names = _class_names(folder)
    graph = HeteroGraph(num_nodes, with_relations_back(edges), x, y, class_names=names, name=folder.name or "ogb")
    return fill_features(graph)


def _check_names(path: Path, names: list[str]) -> None:
    """InputError for names that would lead out of the folder, as folders are named after them."""
    for name in names:
        if any(part in name for part in ("/", "\\", "..")):
            raise InputError(f"{path}: has the name {name!r}, but a name has no '/', '\\' or '..'; rename it")


def _labels(path: Path, table: np.ndarray) -> torch.Tensor:
    """(nodes,) classes, or (nodes, classes) weights where there are several columns; nan is no label."""
    if table.shape[1] == 1:
        labels = np.where(np.isnan(table[:, 0]), -1, table[:, 0])
        wrong = ~((np.abs(labels) < 2**31) & (labels == np.trunc(labels)))
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise InputError(f"{path}: a label must be a whole number or nan, not {labels[row]} as in row {row}")
        return torch.from_numpy(labels.astype(np.int64))
    return torch.from_numpy(np.nan_to_num(table).astype(np.float32))


def _class_names(folder: Path) -> list[str] | None:
    files = sorted((folder / "mapping").glob("labelidx2*.csv.gz"))
    if len(files) != 1:
        return None
    names: list[str] = []
    for row in _rows(files[0], None)[1:]:
        if len(row) < 2 or row[0] != str(len(names)):
            raise InputError(f"{files[0]}: must have index {len(names)} and a name, not {row}")
        names.append(row[1] if row[1] not in names else f"{row[1]} ({row[0]})")
    return names


def _rows(path: Path, count: int | None) -> list[list[str]]:
    """Lines of a .csv.gz as lists of texts; InputError where it is missing or has not `count` of them."""
    if not path.is_file():
        raise InputError(f"{path}: is missing; pass a folder in OGB's raw layout")
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, ValueError, EOFError, zlib.error, csv.Error) as error:
        raise InputError(f"{path}: is no gzipped .csv in UTF-8 ({one_line(error)})") from error
    if count is not None and len(rows) != count:
        raise InputError(f"{path}: must have {count} lines, not {len(rows)}")
    return rows
