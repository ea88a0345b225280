"""One layer of heterogeneous message passing (HMPNN), folded: no message is ever computed for an edge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _dispatch
from . import folded, reference
from .operator import HmpnnLayer
from .plan import LayerPlan

IMPLEMENTATIONS = ("reference", "native", "cuda")

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def hmpnn_layer(
    h: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor],
    p: Sequence[torch.Tensor],
    q: Sequence[torch.Tensor],
    plan: LayerPlan,
    impl: str = "auto",
) -> list[torch.Tensor]:
    """h'_t = relu(h_t own_t^T + sum over relations r into t of mean_r(h_s) P_r^T + h_t Q_r^T where t has an r-edge).

    With W_t = [T_1 .. T_R T_0] and M_r = [M_src M_dst] of the edge-level layer, own_t = I + T_0, P_r = T_r M_src and
    Q_r = T_r M_dst: the same function, since nothing nonlinear stands between M and W.

    Args:
        h: states of each node type, (nodes, D); float32 or bfloat16 (float64: reference alone).
        own: (D, D) of each type. p, q: (D, D) of each relation, in the order of the plan. Cast to the dtype of h for
            the products, which sum in float32.
        plan: `LayerPlan` of the graph.
        impl: "auto", "reference", "native" (C++, CPU) or "cuda". A named one runs or raises, it never falls back.

    Returns:
        New states of each type, (plan.num_out, D), else as h. Gradients reach h, own, p and q, once (no double
        backward, except with impl="reference").

    Cost, for N nodes and, summed over relations, E edges and n rows of the smaller side: 2 (N + n) D^2 flops of
    products and E D additions forward, twice that backward; no number of bytes but of h, h', a product (N + n) D and
    the structure. Kept for the backward pass: h, h', and one (targets, D) for each relation with fewer targets than
    sources.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Yoon et al., "Zero-shot Transfer Learning within a Heterogeneous Graph via Knowledge Transfer Networks",
    NeurIPS 2022 (arXiv 2203.02018), equations 1 to 3, with the self term and the residual of the authors' code.
    """
    _check(h, own, p, q, plan)

    def refuses(name: str) -> str | None:
        if name != "reference" and h[0].dtype == torch.float64:
            return "it takes float32 and bfloat16, not float64; use impl='reference'"
        return None

    chosen = _dispatch.choose("hmpnn_layer", impl, IMPLEMENTATIONS, h[0].device.type, refuses)
    if chosen == "reference":
        return reference.hmpnn_layer(h, own, p, q, plan)
    if _dispatch.runs_eagerly(*h, *own, *p, *q):
        return folded.forward(h, own, p, q, plan, chosen)[0]
    states = list(HmpnnLayer.apply(plan.key, chosen, len(h), len(p), *h, *own, *p, *q))
    if not torch.compiler.is_compiling() and states[0].grad_fn is not None:
        states[0].grad_fn.metadata["plan"] = plan  # lives as long as a backward pass may need it
    return states


def _check(h: Sequence[torch.Tensor], own: Sequence, p: Sequence, q: Sequence, plan: LayerPlan) -> None:
    counts = plan.num_nodes
    if (len(h), len(own)) != (len(counts), len(counts)):
        raise ValueError(f"h and own must be one tensor for each of {len(counts)} types, not {len(h)} and {len(own)}")
    if (len(p), len(q)) != (len(plan.relations), len(plan.relations)):
        relations = len(plan.relations)
        raise ValueError(f"p and q must be one tensor for each of {relations} relations, not {len(p)} and {len(q)}")
    if not h:
        raise ValueError("h must be the states of at least one node type")
    width = h[0].shape[-1]
    for t, (states, count) in enumerate(zip(h, counts, strict=True)):
        if states.dtype not in _DTYPES or states.dtype != h[0].dtype or states.device != h[0].device:
            raise ValueError(
                f"h[{t}] must be in one of {_DTYPES}, the same for all and on one device, not {states.dtype} on"
                f" {states.device}"
            )
        if states.shape != (count, width):
            raise ValueError(f"h[{t}] must be {(count, width)} as the plan has it, not {tuple(states.shape)}")
    for device in plan.devices:
        if device != h[0].device:
            raise ValueError(f"h is on {h[0].device} and the plan's relations on {device}: move one with .to(device)")
    for name, weights in (("own", own), ("p", p), ("q", q)):
        for i, weight in enumerate(weights):
            if weight.shape != (width, width) or not weight.is_floating_point() or weight.device != h[0].device:
                raise ValueError(
                    f"{name}[{i}] must be floating point, {(width, width)} on {h[0].device}, not {tuple(weight.shape)}"
                    f" {weight.dtype} on {weight.device}"
                )
