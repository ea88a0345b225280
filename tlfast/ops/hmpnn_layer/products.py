"""Dense products of the layer in the dtype given, with sums in float32: PyTorch's, or on AMX in float32 native ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ... import _native


def _as_given(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Autocast does not reach a product: it would give another dtype than what the product is written or added to."""

    @functools.wraps(product)
    def inner(x: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return product(x, *others, **more)
        with torch.autocast(x.device.type, enabled=False):
            return product(x, *others, **more)

    return inner


@_as_given
def times_transposed(
    x: torch.Tensor, w: torch.Tensor, into: torch.Tensor | None = None, add_to: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ w.T, written into `into` or added to `add_to` where given; x (N, K), w (M, K)."""
    if not _on_amx(x):
        return torch.mm(x, w.t(), out=into) if add_to is None else add_to.addmm_(x, w.t())
    y = into if add_to is None else add_to
    x, w = (operand if operand.stride(1) == 1 else operand.contiguous() for operand in (x, w))
    if y is None:
        y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device="cpu")
    _native.library().product_fp32_cpu(
        x.data_ptr(),
        w.data_ptr(),
        y.data_ptr(),
        *x.shape,
        w.shape[0],
        x.stride(0),
        w.stride(0),
        y.stride(0),
        add_to is not None,
        torch.get_num_threads(),
    )
    return y


@_as_given
def transposed_times(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g.T @ x; g (N, M) and x (N, K). PyTorch's: split operands gain nothing where both have to be transposed."""
    return torch.mm(g.t(), x)


def _on_amx(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _native.matrix_isa() == "AMX"
