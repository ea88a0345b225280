"""Knowledge transfer: maps the target type's states to where the source type's classifier can read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..data.errors import InputError
from ..graph import Adjacency, as_graph
from ..ops import hetero_aggregate
from .hmpnn import parameter_name
from .metapaths import Metapath, metapaths

CHUNK_ROWS = 16384


class KnowledgeTransfer(nn.Module):
    """A d x d matrix for each metapath and relation on it, fitted so that target states, passed on, give source states.

    Args:
        data: HeteroData, `tlfast.graph.HeteroGraph` or `Adjacency`: what has the relations.
        source, target: node types; labels are on the source.
        hops: longest metapath, see `metapaths`.
        dim: d, width of the states.

    Attributes:
        paths: the metapaths. matrices: parameters, one for each path and relation; a repeated relation shares its one.

    Raises:
        InputError: no metapath within the hops (the message lists what exists), unknown types, dim below 1.

    Source: Yoon et al., NeurIPS 2022 (arXiv 2203.02018), section 5.2, algorithm 1; as the authors' code has it, the
    loss is a mean of squares and a prediction averages over the paths.
    """

    def __init__(self, data: Any, source: str, target: str, hops: int = 1, dim: int = 128) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"dim must be at least 1, not {dim}")
        edge_types = data.edge_types if isinstance(data, Adjacency) else as_graph(data).edge_types
        self.source, self.target = source, target
        self.paths = metapaths(edge_types, source, target, hops)
        self.matrices = nn.ParameterDict()
        for i, path in enumerate(self.paths):
            for edge_type in dict.fromkeys(path):
                weight = nn.Parameter(torch.empty(dim, dim))
                nn.init.xavier_uniform_(weight)
                self.matrices[f"{i}:{parameter_name(edge_type)}"] = weight

    def matching_loss(
        self, h: Mapping[str, torch.Tensor], adjacency: Adjacency, nodes: int | None = None
    ) -> torch.Tensor:
        """Sum over paths of the mean of (h_S - A_1 .. A_k h_T C)^2, A row-normalised and C the path's matrix, scalar.

        h: states of the source and target type, (nodes, d). All source nodes count, also those no path leads to, or
        the first `nodes` of them, whose states are enough then.
        """
        states, width = h[self.source][:nodes], h[self.source].shape[1]
        total = states.new_zeros((), dtype=self._dtype)
        for path, matrix in zip(self.paths, self._chains(), strict=True):
            reached = h[self.target]
            for edge_type in reversed(path):
                reached = hetero_aggregate(reached, adjacency[edge_type])
            total = total + SquaredDistance.apply(states, reached[: states.shape[0]], matrix) / max(
                states.shape[0] * width, 1
            )
        return total

    def matrix(self) -> torch.Tensor:
        """The transfer as one (d, d), h_T -> h_T matrix: the mean over paths of the product of a path's matrices."""
        return torch.stack(list(self._chains())).mean(0)

    def transform(self, h: torch.Tensor) -> torch.Tensor:
        """Target states (nodes, d) as source states, in the dtype of the matrices."""
        return h.to(self._dtype) @ self.matrix()

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.matrices.values())).dtype

    def _chains(self) -> Iterator[torch.Tensor]:
        """Of each path the product of its matrices: aggregation and matrices commute, so a chain is one (d, d)."""
        for i, path in enumerate(self.paths):
            yield self._chain(i, path)

    def _chain(self, i: int, path: Metapath) -> torch.Tensor:
        matrices = [self.matrices[f"{i}:{parameter_name(edge_type)}"].t() for edge_type in reversed(path)]
        product = matrices[0]
        for matrix in matrices[1:]:
            product = product @ matrix
        return product


class SquaredDistance(torch.autograd.Function):
    """||h - x C||^2 without the residual as a tensor: it is made a block of rows at a time, and again for gradients.

    Gram matrices would need no residual either, but lose to cancellation all digits that a good fit leaves.
    """

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h, x, matrix)
        total = matrix.new_zeros(())
        for rows in _chunks(h.shape[0]):
            total += torch.linalg.vector_norm(_residual(h[rows], x[rows], matrix)).square()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, x, matrix = ctx.saved_tensors
        need_h, need_x, need_matrix = ctx.needs_input_grad
        dh = torch.empty_like(h) if need_h else None
        dx = torch.empty_like(x) if need_x else None
        dmatrix = torch.zeros_like(matrix) if need_matrix else None
        for rows in _chunks(h.shape[0]):
            residual = _residual(h[rows], x[rows], matrix).mul_(2 * gradient)
            if dh is not None:
                dh[rows] = residual
            if dx is not None:
                dx[rows] = (residual @ matrix.t()).neg_()
            if dmatrix is not None:
                dmatrix -= x[rows].to(matrix.dtype).t() @ residual
        return dh, dx, dmatrix


def _residual(h: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return h.to(matrix.dtype) - x.to(matrix.dtype) @ matrix


def _chunks(rows: int) -> Iterator[slice]:
    for first in range(0, rows, CHUNK_ROWS):
        yield slice(first, min(first + CHUNK_ROWS, rows))
