"""The heterogeneous message passing network of KTN, computed folded."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..data.errors import InputError
from ..graph import Adjacency, EdgeType, as_graph
from ..graph.hetero import there_are
from ..graph.loader import Sampled
from ..ops import LayerPlan, hmpnn_layer
from ..ops.hmpnn_layer import project


def parameter_name(kind: str | EdgeType) -> str:
    """A node type's or a relation's name among a module's parameters: no dot, no name for two, none that is taken."""
    if isinstance(kind, tuple):
        return "__".join(_ends_alone(part) for part in kind)
    return _ends_alone(kind) + ("#t" if hasattr(nn.ParameterDict(), kind) else "")


def _ends_alone(name: str) -> str:
    """Without a dot, and without what joins names to a relation's."""
    return re.sub(r"^_|_$|_(?=_)", "#u", name.replace("#", "##").replace(".", "#d"))


class HmpnnLayer(nn.Module):
    """Weights of one layer: message[r] = M_r (d_rel, 2 d) of each relation, transform[t] = W_t (d, R d_rel + d)."""

    def __init__(self, node_types: list[str], edge_types: list[EdgeType], hidden_dim: int, relation_dim: int) -> None:
        super().__init__()
        self.edge_types, self.node_types, self.relation_dim = edge_types, node_types, relation_dim
        self.into = {t: [edge_type for edge_type in edge_types if edge_type[2] == t] for t in node_types}
        self.message, self.transform = nn.ParameterDict(), nn.ParameterDict()
        for edge_type in edge_types:
            self.message[parameter_name(edge_type)] = nn.Parameter(torch.empty(relation_dim, 2 * hidden_dim))
        for t, relations in self.into.items():
            width = relation_dim * len(relations) + hidden_dim
            self.transform[parameter_name(t)] = nn.Parameter(torch.empty(hidden_dim, width))
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight)

    def fold(
        self, edge_types: Collection[EdgeType] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """own of each type, P and Q of each relation, as `tlfast.ops.hmpnn_layer` takes them.

        edge_types: the relations that have edges, of which alone P and Q are made, 0 for others; None: all.
        """
        own, p, q = [], {}, {}
        for t in self.node_types:
            transform, relations = self.transform[parameter_name(t)], self.into[t]
            *parts, self_term = transform.split([self.relation_dim] * len(relations) + [transform.shape[0]], dim=1)
            own.append(self_term + torch.eye(transform.shape[0], dtype=transform.dtype, device=transform.device))
            for edge_type, part in zip(relations, parts, strict=True):
                if edge_types is None or edge_type in edge_types:
                    p[edge_type], q[edge_type] = (part @ self.message[parameter_name(edge_type)]).chunk(2, dim=1)
                else:
                    p[edge_type] = q[edge_type] = transform.new_zeros(()).expand(2 * [transform.shape[0]])
        return own, [p[edge_type] for edge_type in self.edge_types], [q[edge_type] for edge_type in self.edge_types]


class HMPNN(nn.Module):
    """h_t = X_t A_t^T, then num_layers times h'_t = relu(W_t [mean_1 .. mean_R h_t] + h_t).

    mean_r(v) is the mean over the edges u -> v of relation r of M_r [h_u; h_v], 0 without edges; relations into a type
    stand in the order of data. The weights are these M and W; what runs is `tlfast.ops.hmpnn_layer`.

    Args:
        data: HeteroData or `tlfast.graph.HeteroGraph`; every node type has features x.
        hidden_dim: d, width of all states. relation_dim: d_rel, width of messages; default: hidden_dim.
        num_layers: at least 1.
        dtype: of states and products, torch.float32 or torch.bfloat16 (sums in float32, parameters stay float32), or
            torch.float64 for checking.

    Raises:
        InputError: a type without features, or features that are not finite; widths or layers below 1; other dtypes.

    Source: Yoon et al., "Zero-shot Transfer Learning within a Heterogeneous Graph via Knowledge Transfer Networks",
    NeurIPS 2022 (arXiv 2203.02018), section 3, with the self term and the residual that the authors' code has.
    """

    def __init__(
        self,
        data: Any,
        hidden_dim: int = 128,
        relation_dim: int | None = None,
        num_layers: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        graph = as_graph(data)
        relation_dim = hidden_dim if relation_dim is None else relation_dim
        for name, value in (("hidden_dim", hidden_dim), ("relation_dim", relation_dim), ("num_layers", num_layers)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise InputError(f"dtype must be torch.float32, torch.bfloat16 or torch.float64, not {dtype}")
        for node_type in graph.node_types:
            if node_type not in graph.x:
                raise InputError(f"node type {node_type!r} has no features; set data[{node_type!r}].x")
        self.node_types, self.edge_types = tuple(graph.node_types), tuple(graph.edge_types)
        self.hidden_dim, self.relation_dim, self.dtype = hidden_dim, relation_dim, dtype
        self.adapt = nn.ParameterDict(
            {parameter_name(t): nn.Parameter(torch.empty(hidden_dim, graph.x[t].shape[1])) for t in self.node_types}
        )
        for weight in self.adapt.values():
            nn.init.xavier_uniform_(weight)
        self.layers = nn.ModuleList(
            HmpnnLayer(list(self.node_types), list(self.edge_types), hidden_dim, relation_dim)
            for _ in range(num_layers)
        )

    def forward(self, x: Mapping[str, torch.Tensor], adjacency: Adjacency | Sampled) -> dict[str, torch.Tensor]:
        """States of the last layer, {type: (nodes, hidden_dim)} in the model's dtype; of a `Sample` those of its seeds.

        x: features of every type. Raises InputError for a type that is missing, or features of another shape.
        """
        states = [self._adapt(x, t) for t in self.node_types]
        plans = adjacency.plans(self.node_types, self.edge_types, len(self.layers))
        for layer, plan in zip(self.layers, plans, strict=True):
            assert isinstance(layer, HmpnnLayer)
            own, p, q = layer.fold(self._linked(plan))
            states = hmpnn_layer(states, own, p, q, plan)
        return dict(zip(self.node_types, states, strict=True))

    def _linked(self, plan: LayerPlan) -> set[EdgeType] | None:
        """The relations that have edges in a sampled batch; None, all, on a whole graph: each weight has a gradient."""
        return {self.edge_types[i] for i in plan.used} if plan.num_out != plan.num_nodes else None

    def _adapt(self, x: Mapping[str, torch.Tensor], node_type: str) -> torch.Tensor:
        weight = self.adapt[parameter_name(node_type)]
        if node_type not in x:
            raise InputError(f"x has no features of node type {node_type!r}; {there_are(x)}")
        features = x[node_type]
        if features.dim() != 2 or features.shape[1] != weight.shape[1]:
            wanted = f"(nodes, {weight.shape[1]})"
            raise InputError(f"x[{node_type!r}] must be {wanted} as in training, not {tuple(features.shape)}")
        return project(features.to(self.dtype), weight.to(self.dtype))
