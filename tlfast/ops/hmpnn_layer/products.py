"""Dense products of the layer in the dtype given, with sums in float32: PyTorch's, or on AMX in float32 native ones."""

from __future__ import annotations

import torch

from ... import _native


def times_transposed(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x @ w.T, or out += x @ w.T in place; x (N, K) and w (M, K), all with neighbouring columns."""
    if not _on_amx(x):
        return torch.mm(x, w.t()) if out is None else out.addmm_(x, w.t())
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device="cpu") if out is None else out
    _native.library().product_fp32_cpu(
        x.data_ptr(),
        w.data_ptr(),
        y.data_ptr(),
        *x.shape,
        w.shape[0],
        x.stride(0),
        w.stride(0),
        y.stride(0),
        out is not None,
        torch.get_num_threads(),
    )
    return y


def transposed_times(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """g.T @ x; g (N, M) and x (N, K), with neighbouring columns."""
    if not _on_amx(x):
        return torch.mm(g.t(), x)
    product = torch.empty(g.shape[1], x.shape[1], dtype=x.dtype, device="cpu")
    _native.library().transposed_product_fp32_cpu(
        g.data_ptr(),
        x.data_ptr(),
        product.data_ptr(),
        *g.shape,
        x.shape[1],
        g.stride(0),
        x.stride(0),
        product.stride(0),
        torch.get_num_threads(),
    )
    return product


def _on_amx(x: torch.Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and _native.matrix_isa() == "AMX"
