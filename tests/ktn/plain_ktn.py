"""KTN as the paper's code computes it, an edge and a matrix at a time: what the folded one is compared to."""

from __future__ import annotations

import torch


def mean_matrix(edges, sources, targets, dtype):
    """Row-normalised adjacency, dense."""
    matrix = torch.zeros(targets, sources, dtype=dtype)
    matrix.index_put_((edges[1], edges[0]), torch.ones(edges.shape[1], dtype=dtype), accumulate=True)
    return matrix / matrix.sum(1, keepdim=True).clamp(min=1)


class PlainKTN:
    """Parameters by the names of HMPNN and KnowledgeTransfer, in any dtype."""

    def __init__(self, graph, gnn, ktn, dtype=torch.float64):
        def copied(parameters):
            return {name: p.detach().to(dtype).requires_grad_() for name, p in parameters}

        self.graph, self.node_types, self.edge_types = graph, gnn.node_types, gnn.edge_types
        self.paths, self.source, self.target, self.dtype = ktn.paths, ktn.source, ktn.target, dtype
        self.gnn, self.ktn, self.layers = (
            copied(gnn.named_parameters()),
            copied(ktn.named_parameters()),
            len(gnn.layers),
        )

    def hidden(self):
        h = {t: self.graph.x[t].to(self.dtype) @ self.gnn[f"adapt.{t}"].t() for t in self.node_types}
        for layer in range(self.layers):
            pooled = {t: [] for t in self.node_types}
            for edge_type in self.edge_types:
                source, _, target = edge_type
                edges = self.graph.edges[edge_type].long()
                weight = self.gnn[f"layers.{layer}.message.{'__'.join(edge_type)}"]
                messages = torch.cat([h[source][edges[0]], h[target][edges[1]]], 1) @ weight.t()
                total = h[target].new_zeros(h[target].shape[0], weight.shape[0]).index_add(0, edges[1], messages)
                count = torch.bincount(edges[1], minlength=total.shape[0]).clamp(min=1).unsqueeze(1)
                pooled[target].append(total / count)
            transform = {t: self.gnn[f"layers.{layer}.transform.{t}"] for t in self.node_types}
            h = {t: torch.relu(torch.cat([*pooled[t], h[t]], 1) @ transform[t].t() + h[t]) for t in self.node_types}
        return h

    def matching_loss(self, h):
        total = 0
        for i, path in enumerate(self.paths):
            state = h[self.target]
            for edge_type in reversed(path):
                source, _, target = edge_type
                counts = self.graph.num_nodes[source], self.graph.num_nodes[target]
                state = mean_matrix(self.graph.edges[edge_type].long(), *counts, self.dtype) @ (
                    state @ self.ktn[f"matrices.{i}:{'__'.join(edge_type)}"].t()
                )
            total = total + torch.nn.functional.mse_loss(h[self.source], state)
        return total

    def transform(self, h):
        results = []
        for i, path in enumerate(self.paths):
            state = h
            for edge_type in reversed(path):
                state = state @ self.ktn[f"matrices.{i}:{'__'.join(edge_type)}"].t()
            results.append(state)
        return sum(results) / len(results)
