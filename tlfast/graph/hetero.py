"""A heterogeneous graph in memory, and its conversion from and to torch_geometric.data.HeteroData."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..data.errors import InputError
from ..ops.hetero_aggregate.relation import check_edges

EdgeType = tuple[str, str, str]


@dataclass
class HeteroGraph:
    """Node types with features and labels, and relations between them; needs no PyTorch Geometric.

    Attributes:
        num_nodes: of each node type, in their order.
        edges: (2, E) integers of each relation (source type, name, target type), row 0 sources, row 1 targets. Their
            order is the order in which messages into a type are joined.
        x: (nodes, features) of each type that has features, floating point.
        y: labels of each type that has some: (nodes,) integers with -1 for none, or (nodes, classes) weights whose rows
            are 0 where there is none.
        num_classes, class_names, name: what the labels are, and the graph; names alone say how many there are.

    Raises:
        InputError: a relation names a type that is not there; features or labels that do not fit the nodes, are not
            finite, or are out of range; num_classes, class_names and labels that do not fit each other. Edges are
            checked where they are used, by `Adjacency`, and by `check_edges`.
    """

    num_nodes: dict[str, int]
    edges: dict[EdgeType, torch.Tensor]
    x: dict[str, torch.Tensor] = field(default_factory=dict)
    y: dict[str, torch.Tensor] = field(default_factory=dict)
    num_classes: int | None = None
    class_names: list[str] | None = None
    name: str = "graph"

    def __post_init__(self) -> None:
        for node_type, count in self.num_nodes.items():
            if count < 0:
                raise InputError(f"node type {node_type!r}: must have 0 nodes or more, not {count}")
        self._check_classes()
        for relation in self.edges:
            for end in (relation[0], relation[2]):
                if end not in self.num_nodes:
                    raise InputError(f"relation {relation}: there is no node type {end!r}; {there_are(self.num_nodes)}")
        for what, tensors in (("features", self.x), ("labels", self.y)):
            for node_type, tensor in tensors.items():
                self._check_rows(what, node_type, tensor)
        for node_type, x in self.x.items():
            _check_features(node_type, x)
        for node_type, y in self.y.items():
            self._check_labels(node_type, y)

    @property
    def node_types(self) -> list[str]:
        """Names of the node types."""
        return list(self.num_nodes)

    @property
    def edge_types(self) -> list[EdgeType]:
        """The relations, (source type, name, target type)."""
        return list(self.edges)

    def into(self, node_type: str) -> list[EdgeType]:
        """The relations into a node type, in their order."""
        return [relation for relation in self.edges if relation[2] == node_type]

    def check_edges(self) -> None:
        """InputError for edges that are no (2, E) integers, or name a node that is not there."""
        for edge_type, edge_index in self.edges.items():
            sources, targets = self.num_nodes[edge_type[0]], self.num_nodes[edge_type[2]]
            try:
                check_edges(edge_index, sources, targets, f"edges of {edge_type}")
            except ValueError as error:
                raise InputError(str(error)) from error

    def _check_rows(self, what: str, node_type: str, tensor: torch.Tensor) -> None:
        if node_type not in self.num_nodes:
            raise InputError(f"{what} of {node_type!r}: there is no such node type; {there_are(self.num_nodes)}")
        if tensor.dim() == 0 or tensor.shape[0] != self.num_nodes[node_type]:
            given = tuple(tensor.shape)
            raise InputError(
                f"{what} of {node_type!r}: {self.num_nodes[node_type]} nodes need as many rows, not {given}"
            )

    def _check_classes(self) -> None:
        count, names = self.num_classes, self.class_names
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InputError(f"num_classes must be a whole number of at least 1, or left out, not {count!r}")
        if names is None:
            return
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InputError(f"class_names must be a list of texts, one for each class, not {str(names)[:80]!r}")
        if len(set(names)) != len(names):
            raise InputError(f"class_names must differ, but {max(names, key=list(names).count)!r} stands there twice")
        if count is not None and len(names) != count:
            raise InputError(f"class_names has {len(names)} names and num_classes is {count}; make them agree")
        self.num_classes = len(names)

    def _check_labels(self, node_type: str, y: torch.Tensor) -> None:
        if y.dim() == 1 and not y.is_floating_point():
            limit = self.num_classes
            if y.numel() and (int(y.min()) < -1 or (limit is not None and int(y.max()) >= limit)):
                classes = "a class" if limit is None else f"a class below {limit}"
                raise InputError(f"labels of {node_type!r}: must be -1 or {classes}, not {_extreme(y)}")
        elif y.dim() != 2 or not y.is_floating_point() or not bool((y >= 0).all()):
            raise InputError(
                f"labels of {node_type!r}: must be (nodes,) integers or (nodes, classes) weights of at least 0, not"
                f" {tuple(y.shape)} {y.dtype}"
            )
        elif self.num_classes is not None and y.shape[1] != self.num_classes:
            raise InputError(
                f"labels of {node_type!r}: have {y.shape[1]} classes, and num_classes or class_names say"
                f" {self.num_classes}"
            )


def as_graph(data: Any) -> HeteroGraph:
    """A `HeteroGraph`, or a HeteroData as one; shares its tensors.

    A type's number of nodes is num_nodes, else the rows of x or y.
    Raises InputError for anything else, and what HeteroGraph raises.
    """
    if isinstance(data, HeteroGraph):
        return data
    if not all(hasattr(data, name) for name in ("node_types", "edge_types", "node_stores")):
        raise InputError(f"data must be a HeteroData or a HeteroGraph, not {type(data).__name__}")
    num_nodes, x, y = {}, {}, {}
    for node_type in data.node_types:
        store = data[node_type]
        if store.num_nodes is None:
            raise InputError(f"node type {node_type!r}: has neither x nor num_nodes; set data[{node_type!r}].num_nodes")
        num_nodes[node_type] = int(store.num_nodes)
        if "x" in store:
            x[node_type] = store.x
        if "y" in store:
            y[node_type] = store.y
    edges = {tuple(edge_type): data[edge_type].edge_index for edge_type in data.edge_types}
    own = data._global_store  # data[name] would look among the node types too, and make one
    named = {name: own[name] for name in ("num_classes", "class_names", "name") if name in own}
    return HeteroGraph(num_nodes, edges, x, y, **named)  # type: ignore[arg-type]


def to_hetero_data(graph: HeteroGraph) -> Any:
    """The graph as torch_geometric.data.HeteroData; shares its tensors, with edges as int64."""
    try:
        from torch_geometric.data import HeteroData
    except ImportError as error:
        fix = 'run pip install "torch_geometric>=2.6", or use tlfast.graph.read_folder, which does without'
        raise ImportError(f"HeteroData is PyTorch Geometric's, which is not installed: {fix}") from error
    data = HeteroData()
    for node_type, count in graph.num_nodes.items():
        data[node_type].num_nodes = count
        if node_type in graph.x:
            data[node_type].x = graph.x[node_type]
        if node_type in graph.y:
            data[node_type].y = graph.y[node_type]
    for edge_type, edge_index in graph.edges.items():
        data[edge_type].edge_index = edge_index.to(torch.int64)
    for name in ("num_classes", "class_names", "name"):
        if getattr(graph, name) is not None:
            data[name] = getattr(graph, name)
    return data


def _check_features(node_type: str, x: torch.Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise InputError(
            f"features of {node_type!r}: must be (nodes, features) floating point, not {tuple(x.shape)} {x.dtype}"
        )
    wrong = ~torch.isfinite(x).all(1)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise InputError(
            f"features of {node_type!r}: {int(wrong.sum())} rows hold NaN or infinity, the first is row {first}; mend"
            " or drop these nodes"
        )


def there_are(named: Iterable[Any]) -> str:
    """For a message: the names that exist."""
    return f"there are {', '.join(map(repr, named)) or 'none'}"


def _extreme(y: torch.Tensor) -> int:
    return int(y.min()) if int(y.min()) < -1 else int(y.max())
