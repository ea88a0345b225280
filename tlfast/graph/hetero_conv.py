"""PyTorch Geometric's HeteroConv of mean SAGEConv, on the kernels of `hetero_aggregate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data.errors import InputError
from ..ops import hetero_aggregate
from .adjacency import Adjacency
from .hetero import EdgeType, there_are

_GROUPED = ("sum", "mean", "min", "max", "cat", None)
Sizes = tuple[int | tuple[int, int], int]


class HeteroConv(nn.Module):
    """y_t = over the relations s -> t, summed: mean_r(x_s) W_r^T + b_r + x_t R_r^T, as PyG's HeteroConv of SAGEConv.

    Args:
        convs: {(source type, name, target type): torch_geometric.nn.SAGEConv, whose layers are shared, or sizes
            (in, out) or ((in of sources, in of targets), out), which need no PyG}. A SAGEConv has aggr="mean" and
            neither normalize nor project.
        aggr: how relations into one type join: "sum", "mean", "min", "max", "cat", or None for (nodes, relations, out).

    Parameters are named as PyG names them, so `load_state_dict` goes both ways.

    A relation is multiplied before or after its aggregation, whichever takes fewer additions and products; with "sum"
    and "mean" all x_t R_r^T are one product, and nothing of the size edges x width is allocated.

    Raises:
        InputError: no relations, other convolutions or options, or an unknown aggr.

    Source: Hamilton et al., "Inductive Representation Learning on Large Graphs", NeurIPS 2017, algorithm 1, mean
    aggregator without its normalisation; a relation at a time.
    """

    def __init__(self, convs: Mapping[EdgeType, Any], aggr: str | None = "sum") -> None:
        super().__init__()
        if aggr not in _GROUPED:
            raise InputError(f"aggr must be one of {_GROUPED}, not {aggr!r}")
        if not convs:
            raise InputError("convs is empty; pass a SAGEConv, or (in, out), for each relation")
        self.aggr, self.edge_types = aggr, tuple(convs)
        self.convs = nn.ModuleDict({_key(edge_type): _mean_sage(edge_type, conv) for edge_type, conv in convs.items()})

    def forward(
        self, x_dict: Mapping[str, torch.Tensor], edge_index_dict: Mapping[EdgeType, torch.Tensor] | Adjacency
    ) -> dict[str, torch.Tensor]:
        """{target type: (nodes, out)} of the relations that both this layer and the graph have.

        x_dict: features of every type at either end. edge_index_dict: `Adjacency`, built once and kept, or edge lists
        {relation: (2, E)}, which are sorted anew at each call.
        Raises InputError for a type without features, or edges that name a node that is not there.
        """
        adjacency = self._adjacency(x_dict, edge_index_dict)
        into: dict[str, list[EdgeType]] = {}
        for edge_type in self.edge_types:
            if edge_type in adjacency.relations:
                for end in (edge_type[0], edge_type[2]):
                    if end not in x_dict:
                        raise InputError(f"x_dict has no {end!r}, an end of {edge_type}; {there_are(x_dict)}")
                into.setdefault(edge_type[2], []).append(edge_type)
        together = self._summed if self.aggr in ("sum", "mean") else self._grouped
        return {t: together(x_dict, adjacency, relations) for t, relations in into.items()}

    def _layer(self, edge_type: EdgeType) -> Any:
        return self.convs[_key(edge_type)]

    def _adjacency(self, x_dict: Mapping[str, torch.Tensor], edges: Any) -> Adjacency:
        if isinstance(edges, Adjacency):
            return edges
        counts = {t: x.shape[0] for t, x in x_dict.items()}
        return Adjacency({tuple(r): pairs for r, pairs in edges.items() if tuple(r) in self.edge_types}, counts)

    def _summed(self, x: Mapping[str, torch.Tensor], adjacency: Adjacency, relations: list[EdgeType]) -> torch.Tensor:
        """All relations into one type: one product of the targets' own features, the means added on to it."""
        layers = [self._layer(edge_type) for edge_type in relations]
        own = x[relations[0][2]]
        y: torch.Tensor | None = None
        roots = [layer.lin_r for layer in layers if layer.lin_r is not None]
        if roots:
            for root in roots:
                _make(root, own)
            y = F.linear(own, torch.stack([root.weight for root in roots]).sum(0))
        for edge_type, layer in zip(relations, layers, strict=True):
            y = _add_mean(y, layer.lin_l, x[edge_type[0]], adjacency, edge_type)
        assert y is not None
        biases = [layer.lin_l.bias for layer in layers if layer.lin_l.bias is not None]
        if biases:
            y = y + torch.stack(biases).sum(0).to(y.dtype)
        return y / len(relations) if self.aggr == "mean" else y

    def _grouped(self, x: Mapping[str, torch.Tensor], adjacency: Adjacency, relations: list[EdgeType]) -> torch.Tensor:
        """Relations one by one, then joined."""
        parts = list(self._one_by_one(x, adjacency, relations))
        if self.aggr is None:
            return torch.stack(parts, dim=1)
        if self.aggr == "cat":
            return torch.cat(parts, dim=-1)
        stacked = torch.stack(parts)
        return stacked.amin(0) if self.aggr == "min" else stacked.amax(0)

    def _one_by_one(
        self, x: Mapping[str, torch.Tensor], adjacency: Adjacency, relations: list[EdgeType]
    ) -> Iterator[torch.Tensor]:
        for edge_type in relations:
            layer, own = self._layer(edge_type), x[edge_type[2]]
            if layer.lin_r is not None:
                _make(layer.lin_r, own)
            root = None if layer.lin_r is None else F.linear(own, layer.lin_r.weight)
            y = _add_mean(root, layer.lin_l, x[edge_type[0]], adjacency, edge_type)
            yield y if layer.lin_l.bias is None else y + layer.lin_l.bias.to(y.dtype)

    def __repr__(self) -> str:
        return f"HeteroConv(num_relations={len(self.edge_types)}, aggr={self.aggr!r})"


class _MeanSage(nn.Module):
    """What SAGEConv has: lin_l of the mean over neighbours, with a bias or without, and lin_r of the node, or None."""

    lin_l: Any  # PyTorch's Linear or PyG's
    lin_r: Any

    def __init__(self, lin_l: nn.Module, lin_r: nn.Module | None) -> None:
        super().__init__()
        self.lin_l, self.lin_r = lin_l, lin_r


def _mean_sage(edge_type: EdgeType, conv: Any) -> _MeanSage:
    if isinstance(conv, tuple):
        inputs, out = conv
        of_source, of_target = (inputs, inputs) if isinstance(inputs, int) else inputs
        return _MeanSage(nn.Linear(of_source, out), nn.Linear(of_target, out, bias=False))
    if type(conv).__name__ != "SAGEConv":
        raise InputError(
            f"convs[{edge_type}] must be a SAGEConv or (in, out), not {type(conv).__name__}; for other convolutions use"
            " torch_geometric.nn.HeteroConv"
        )
    options = {"aggr": conv.aggr, "normalize": conv.normalize, "project": conv.project, "flow": conv.flow}
    if options != {"aggr": "mean", "normalize": False, "project": False, "flow": "source_to_target"}:
        raise InputError(
            f"convs[{edge_type}] must have aggr='mean', normalize=False, project=False and flow='source_to_target', not"
            f" {options}; for others use torch_geometric.nn.HeteroConv"
        )
    return _MeanSage(conv.lin_l, conv.lin_r if conv.root_weight else None)


def _add_mean(
    y: torch.Tensor | None, linear: Any, x: torch.Tensor, adjacency: Adjacency, edge_type: EdgeType
) -> torch.Tensor:
    """y + mean(x) W^T, the product on the cheaper side of the mean."""
    _make(linear, x)
    relation, weight = adjacency[edge_type], linear.weight
    width_out, width_in = weight.shape
    multiplies = width_out * width_in
    first = relation.num_sources * multiplies + relation.num_edges * width_out
    if first <= relation.num_targets * multiplies + relation.num_edges * width_in:
        return hetero_aggregate(F.linear(x, weight), relation, base=y)
    mean = F.linear(hetero_aggregate(x, relation), weight)
    return mean if y is None else y + mean


def _make(linear: Any, x: torch.Tensor) -> None:
    """PyG's layers of unknown input width (-1) get their weights from the first features they see."""
    if isinstance(linear.weight, nn.parameter.UninitializedParameter):
        linear(x[:1])


def _key(edge_type: EdgeType) -> str:
    """A relation's name among the parameters, as PyG's ModuleDict has it."""
    return f"<{'___'.join(edge_type)}>".replace(".", "#")
