"""Mean or sum of neighbours over the relations into one node type: what of message passing is bound by memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import _dispatch
from . import reference
from .operator import Aggregate, kernels
from .relation import Relation, RelationGroup

IMPLEMENTATIONS = ("reference", "native", "cuda")

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def hetero_aggregate(
    x: torch.Tensor | Sequence[torch.Tensor],
    relation: Relation | RelationGroup | Sequence[Relation],
    reduce: str = "mean",
    base: torch.Tensor | None = None,
    relu: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """y[v] = base[v] + the sum over relations of the mean (or sum) of x[u] over the relation's edges u -> v, rectified.

    Args:
        x: features of the source nodes, (sources, D), one tensor for each relation; float32 or bfloat16 (float64:
            reference alone). Rows may be strided.
        relation: `Relation`, or as many as x has tensors, all into the same targets. A list is dealt out to the threads
            at every call: keep a `RelationGroup`.
        reduce: "mean" or "sum"; the mean of no edges is 0.
        base: (targets, D) in the dtype of x, or None for 0.
        relu: max(y, 0) at the end.
        impl: "auto", "reference" (allocates E x D), "native" (C++, CPU) or "cuda". A named one runs or raises.

    Returns:
        (targets, D) in the dtype of x, summed in float32 and rounded once. Gradients reach x and base, once (no double
        backward, except with impl="reference").

    Cost, for E edges, N targets, S sources and itemsize b: E D additions; at least (N + S) D b bytes and 4 (E + N) of
    structure, at most E D b bytes of features where no row is found in a cache twice. The backward pass is the same
    over the transpose. Nothing of size E x D is allocated, and nothing is kept but y where relu is set.

    Raises:
        ValueError: shapes, dtypes, devices, reduce or relations that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: the mean over the edges into a node is AGGREGATE of Yoon et al., "Zero-shot Transfer Learning within a
    Heterogeneous Graph via Knowledge Transfer Networks", NeurIPS 2022 (arXiv 2203.02018), equation 2.
    """
    features = [x] if isinstance(x, torch.Tensor) else list(x)
    group = _group(relation)
    _check(features, group, reduce, base)

    def refuses(name: str) -> str | None:
        if name != "reference" and features[0].dtype == torch.float64:
            return "it takes float32 and bfloat16, not float64; use impl='reference'"
        return None

    chosen = _dispatch.choose("hetero_aggregate", impl, IMPLEMENTATIONS, features[0].device.type, refuses)
    ways = [part for one in group.relations for part in both_ways(one, reduce)]
    forward: tuple[Any, Any, Any, Any] = ways[::6], ways[1::6], ways[2::6], [None] * len(features)
    if chosen == "reference":
        return reference.hetero_aggregate(features, *forward, base, relu)
    if _dispatch.runs_eagerly(*features, base):
        return kernels(chosen).hetero_aggregate(features, *forward, group.tasks, base, relu)
    return Aggregate.apply(base, group.tasks, relu, chosen, len(features), *features, *ways)


def both_ways(relation: Relation, reduce: str) -> list[torch.Tensor | None]:
    """rowptr, col and scale of the targets; rowptr, col and tasks of the gradient, whose columns have that scale."""
    there, back = relation.by_target, relation.by_source
    scale = there.inverse_degree if reduce == "mean" else None
    return [there.rowptr, there.col, scale, back.rowptr, back.col, back.tasks]


def _group(relation: Relation | RelationGroup | Sequence[Relation]) -> RelationGroup:
    if isinstance(relation, RelationGroup):
        return relation
    return RelationGroup([relation] if isinstance(relation, Relation) else relation)


def _check(x: list[torch.Tensor], group: RelationGroup, reduce: str, base: torch.Tensor | None) -> None:
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', not {reduce!r}")
    if len(x) != len(group.relations):
        raise ValueError(f"x must be one tensor for each of {len(group.relations)} relations, not {len(x)}")
    for features, relation in zip(x, group.relations, strict=True):
        if not isinstance(features, torch.Tensor) or features.dtype not in _DTYPES:
            given = features.dtype if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"x must be tensors in one of {_DTYPES}, not {given}")
        if features.dim() != 2 or features.shape[0] != relation.num_sources:
            shape = tuple(features.shape)
            raise ValueError(f"x must be ({relation.num_sources}, D) for {relation}, not {shape}")
        if features.shape[1:] != x[0].shape[1:] or features.dtype != x[0].dtype:
            raise ValueError(
                f"x must agree in width and dtype: {tuple(x[0].shape)} {x[0].dtype}, {tuple(features.shape)}"
                f" {features.dtype}"
            )
        if not features.device == relation.by_target.col.device == x[0].device:
            where = relation.by_target.col.device
            raise ValueError(f"x is on {features.device} and the relation on {where}: move one with .to(device)")
    if base is not None and (base.shape != (group.num_targets, x[0].shape[1]) or base.dtype != x[0].dtype):
        wanted = (group.num_targets, x[0].shape[1])
        raise ValueError(f"base must be {wanted} in {x[0].dtype}, not {tuple(base.shape)} in {base.dtype}")
    if base is not None and base.device != x[0].device:
        raise ValueError(f"base is on {base.device} and x on {x[0].device}: move them to one device")
