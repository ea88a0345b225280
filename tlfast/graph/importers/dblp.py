"""DBLP four-area as the raw archive of PyTorch Geometric's DBLP data set has it (DBLP_processed.zip, unpacked)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...data.errors import InputError
from ..folder import one_line
from ..hetero import EdgeType, HeteroGraph
from .files import edges_of, fill_features, need_folder, read_array

TYPES = ("author", "paper", "term", "conference")  # the codes of node_types.npy
_FEATURES = {"author": "features_0.npz", "paper": "features_1.npz", "term": "features_2.npy"}


def read_dblp(folder: Path) -> HeteroGraph:
    """The graph of a folder (or of its raw/) with

    node_types.npy: 0 author, 1 paper, 2 term, 3 conference, a type's nodes in one piece; adjM.npz: edges between all
    nodes, compressed sparse rows as SciPy saves them; features_0.npz, features_1.npz (sparse) and features_2.npy;
    labels.npy: the area of each author, as a class from 0.

    Conferences get the means of their papers' features. Relations are named <source>_to_<target>.
    Raises InputError for files that are missing, damaged, pickled, or do not fit each other.
    """
    need_folder(folder, "adjM.npz")
    raw = folder / "raw" if (folder / "raw").is_dir() else folder
    codes = _array(raw / "node_types.npy", "node types")
    if codes.ndim != 1 or not np.isin(codes, range(len(TYPES))).all() or (np.diff(codes.astype(np.int64)) < 0).any():
        raise InputError(f"{raw / 'node_types.npy'}: must be ascending codes 0 to 3, one for each node")
    counts = {t: int((codes == code).sum()) for code, t in enumerate(TYPES)}
    row, column, _, shape = _sparse(raw / "adjM.npz")
    if shape != (len(codes), len(codes)):
        raise InputError(f"{raw / 'adjM.npz'}: is {shape}, but node_types.npy has {len(codes)} nodes")
    first = {t: int((codes < code).sum()) for code, t in enumerate(TYPES)}
    edges: dict[EdgeType, torch.Tensor] = {}
    for i, source in enumerate(TYPES):
        for j, target in enumerate(TYPES):
            here = (codes[row] == i) & (codes[column] == j)
            if here.any():
                pairs = np.stack([row[here] - first[source], column[here] - first[target]], 1)
                edges[source, f"{source}_to_{target}", target] = edges_of(pairs)
    x = {t: _features(raw / name) for t, name in _FEATURES.items()}
    y = {"author": torch.from_numpy(_array(raw / "labels.npy", "labels").astype(np.int64))}
    return fill_features(HeteroGraph(counts, edges, x, y, name="DBLP"))


def _array(path: Path, what: str) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{path}: is missing; unpack DBLP_processed.zip of PyTorch Geometric's DBLP data set there")
    return read_array(path, path, what)


def _features(path: Path) -> torch.Tensor:
    if path.suffix == ".npy":
        return torch.from_numpy(_array(path, "features").astype(np.float32))
    row, column, values, shape = _sparse(path)
    dense = torch.zeros(shape)
    dense[row, column] = torch.from_numpy(values.astype(np.float32))
    return dense


def _sparse(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Rows, columns, values and shape of a matrix that scipy.sparse.save_npz wrote in compressed rows."""
    if not path.is_file():
        raise InputError(f"{path}: is missing; unpack DBLP_processed.zip of PyTorch Geometric's DBLP data set there")
    try:
        with np.load(path, allow_pickle=False) as parts:
            column, start, values, shape = (parts[name] for name in ("indices", "indptr", "data", "shape"))
        rows, columns = (int(size) for size in shape)
        row = np.repeat(np.arange(rows), np.diff(start))
        outside = (column < 0).any() or (column >= columns).any()
        if len(start) != rows + 1 or not len(row) == len(column) == len(values) or outside:
            raise ValueError("its arrays do not fit each other")
    except Exception as error:  # a damaged archive raises what its first damaged byte leads to
        raise InputError(
            f"{path}: is no sparse matrix in compressed rows, or is damaged ({one_line(error)})"
        ) from error
    return row, column.astype(np.int64), values, (rows, columns)
