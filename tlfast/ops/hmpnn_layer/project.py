"""A dense product with gradients, by the layer's own routes: it leads features into the first layer."""

from __future__ import annotations

from typing import Any

import torch

from .products import times_transposed, transposed_times

torch.library.define("tlfast::project", "(Tensor x, Tensor w) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("tlfast::project", ("cpu", "cuda"))
@torch.no_grad()
def _project(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return times_transposed(x, w)


@torch.library.register_fake("tlfast::project")
def _project_fake(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[0])


class Project(torch.autograd.Function):
    """x @ w.T; keeps x and w."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return torch.ops.tlfast.project.default(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        dx = torch.ops.tlfast.project.default(dy, w.t().contiguous()) if need_x else None
        return dx, transposed_times(dy, x) if need_w else None


def project(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T for x (N, K) and w (M, K) of one dtype; float64 by PyTorch, twice differentiable.

    Raises ValueError for x and w on different devices.
    """
    if x.device != w.device:
        raise ValueError(f"x is on {x.device} and the weight on {w.device}: move one with .to(device)")
    if x.dtype == torch.float64:
        return torch.nn.functional.linear(x, w)
    return Project.apply(x, w)
