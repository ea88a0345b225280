"""A graph as a folder: graph.json names NumPy arrays beside it. Nothing in it is unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..data.errors import InputError
from .hetero import EdgeType, HeteroGraph, as_graph, to_hetero_data

GRAPH = "graph.json"
_WIDE = (torch.uint16, torch.uint32, torch.uint64)  # PyTorch computes next to nothing in them


def load(folder: str | Path) -> Any:
    """torch_geometric.data.HeteroData of a folder with graph.json; features become float32, indices int64.

    Raises InputError for a folder that cannot be read, ImportError without PyTorch Geometric (see `read_folder`).
    """
    return to_hetero_data(read_folder(folder))


def read_folder(folder: str | Path) -> HeteroGraph:
    """The `HeteroGraph` of a folder with graph.json, which lists

    node_types: {type: {"num_nodes": N, "x": array (N, features), "y": array (N,) or (N, classes)}}, x and y optional;
    edge_types: [{"source": type, "relation": name, "target": type, "edge_index": array (2, E)}];
    and, optionally, name, num_classes, class_names. An array is the path of an .npy file in the folder.

    Raises InputError for what is missing, damaged, pickled or outside the folder.
    """
    folder = Path(folder)
    listing = _read_listing(folder)
    num_nodes, x, y = {}, {}, {}
    for node_type, entry in _entry(folder, listing, "node_types", dict).items():
        num_nodes[node_type] = _entry(folder, entry, "num_nodes", int)
        if "x" in entry:
            x[node_type] = _read_array(folder, entry["x"]).to(torch.float32)
        if "y" in entry:
            labels = _read_array(folder, entry["y"])
            y[node_type] = labels.to(torch.float32 if labels.is_floating_point() else torch.int64)
    edges: dict[EdgeType, torch.Tensor] = {}
    for entry in _entry(folder, listing, "edge_types", list):
        source, relation, target = (_entry(folder, entry, part, str) for part in ("source", "relation", "target"))
        if (source, relation, target) in edges:
            raise InputError(f"{folder / GRAPH}: names the relation {(source, relation, target)} twice; rename one")
        edge_index = _read_array(folder, _entry(folder, entry, "edge_index", str))
        edges[source, relation, target] = edge_index.to(torch.int64) if edge_index.dtype in _WIDE else edge_index
    optional = {name: listing[name] for name in ("num_classes", "class_names", "name") if name in listing}
    try:
        return HeteroGraph(num_nodes, edges, x, y, **optional)
    except InputError as error:
        raise InputError(f"{folder / GRAPH}: {error}") from error


def save(data: Any, folder: str | Path) -> None:
    """Write a HeteroGraph or HeteroData as a folder that `load` and `read_folder` read.

    Files of the same names are replaced. Edges are written as int32 where the nodes allow it, features and labels in
    their dtype (bfloat16 as float32).
    Raises InputError, before it writes, for edges that name a node that is not there.
    """
    graph, folder = as_graph(data), Path(folder)
    graph.check_edges()
    folder.mkdir(parents=True, exist_ok=True)
    listing: dict[str, Any] = {"name": graph.name}
    for name in ("num_classes", "class_names"):
        if getattr(graph, name) is not None:
            listing[name] = getattr(graph, name)
    listing["node_types"], listing["edge_types"] = {}, []
    for i, (node_type, count) in enumerate(graph.num_nodes.items()):
        entry: dict[str, Any] = {"num_nodes": count}
        for kind, tensors in (("x", graph.x), ("y", graph.y)):
            if node_type in tensors:
                entry[kind] = _write_array(folder, f"node{i}.{kind}.npy", tensors[node_type])
        listing["node_types"][node_type] = entry
    for i, (edge_type, edge_index) in enumerate(graph.edges.items()):
        small = all(graph.num_nodes[end] < 2**31 for end in (edge_type[0], edge_type[2]))
        named = _write_array(folder, f"edges{i}.npy", edge_index.to(torch.int32 if small else torch.int64))
        names = dict(zip(("source", "relation", "target"), edge_type, strict=True))
        listing["edge_types"].append(names | {"edge_index": named})
    (folder / GRAPH).write_text(json.dumps(listing, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(graph: HeteroGraph) -> str:
    """SHA-256 of all that a folder holds of the graph: two graphs with the same one give the same results."""
    named = [graph.num_nodes, [list(edge_type) for edge_type in graph.edges], graph.num_classes, graph.class_names]
    found = hashlib.sha256(json.dumps(named).encode())
    for kind, tensors in (("x", graph.x), ("y", graph.y), ("edges", graph.edges)):
        for name, tensor in tensors.items():
            found.update(f"{kind} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read_listing(folder: Path) -> dict[str, Any]:
    path = folder / GRAPH
    if not path.is_file():
        raise InputError(f"{folder}: there is no {GRAPH} in it; pass a folder that tlfast.graph.save wrote")
    try:
        listing = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON in UTF-8 ({one_line(error)}); write it again") from error
    if not isinstance(listing, dict):
        raise InputError(f"{path}: must hold an object with node_types and edge_types")
    return listing


def _entry(folder: Path, mapping: Any, name: str, kind: type) -> Any:
    value = mapping.get(name) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{folder / GRAPH}: lacks {name!r}, or it is no {kind.__name__}, in {str(mapping)[:80]}")
    return value


def _read_array(folder: Path, name: Any) -> torch.Tensor:
    """The array of a file in the folder; neither a path nor a link may lead out of it."""
    if not isinstance(name, str):
        raise InputError(f"{folder / GRAPH}: an array must be the path of an .npy file, not {name!r}")
    try:
        path, home = (folder / name).resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, too long
        raise InputError(f"{folder / GRAPH}: {name!r} is no path of a file ({one_line(error)})") from error
    if not path.is_relative_to(home):
        raise InputError(f"{folder / GRAPH}: {name!r} points outside the folder; put the file into it")
    array = load_array(path, folder / name)
    return torch.from_numpy(np.ascontiguousarray(array))


def load_array(file: IO[bytes] | Path, path: Path) -> np.ndarray:
    """The next array of numbers of an open .npy file, or that of a path; InputError, which names `path`, otherwise."""
    try:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise TypeError(f"but {getattr(array, 'dtype', 'an archive')}")
        torch.from_numpy(np.empty(0, array.dtype))  # raises for what PyTorch has not, such as another byte order
    except Exception as error:  # a damaged file raises what its first damaged byte leads to
        words = f"is no .npy array of numbers ({one_line(error)}); write it with numpy.save"
        raise InputError(f"{path}: {words}") from error
    return array


def one_line(error: BaseException) -> str:
    """What an error says, short and without line breaks."""
    return " ".join(f"{error}".split())[:200] or type(error).__name__


def _write_array(folder: Path, name: str, tensor: torch.Tensor) -> str:
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    try:
        np.save(folder / name, array, allow_pickle=False)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy says only how many bytes were written of those it wanted to
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(folder / name)) from error
    return name
