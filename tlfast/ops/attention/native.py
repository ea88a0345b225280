"""Attention on the CPU: C++ (csrc/ops/cpu/attention.cpp)."""

from __future__ import annotations

import torch

from ... import _native
from ..dropout import unsigned


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias, key_mask = _bias_rows(bias, k.shape[1]), _bytes(key_mask)
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    statistics = torch.empty((batch, heads, queries, 2), dtype=torch.float32, device="cpu")
    _native.library().attention_forward_cpu(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        _native.pointer(bias),
        _native.pointer(key_mask),
        out.data_ptr(),
        statistics.data_ptr(),
        *_sizes(q, k, v, bias),
        *_settings(q.dtype, causal, scale, dropout_p, seed),
    )
    return out, statistics


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    statistics: torch.Tensor,
    causal: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    need_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dout = dout.contiguous()
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias_rows, key_mask = _bias_rows(bias, k.shape[1]), _bytes(key_mask)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device="cpu") for x in (q, k, v))
    dbias = None
    if bias is not None and need_dbias:
        dbias = torch.zeros((bias.shape[0], q.shape[2], q.shape[1], k.shape[1]), dtype=torch.float32, device="cpu")
    _native.library().attention_backward_cpu(
        dout.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        _native.pointer(bias_rows),
        _native.pointer(key_mask),
        out.data_ptr(),
        statistics.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        _native.pointer(dbias),
        0 if dbias is None else dbias.shape[0],
        *_sizes(q, k, v, bias_rows),
        *_settings(q.dtype, causal, scale, dropout_p, seed),
    )
    return dq, dk, dv, None if bias is None or dbias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x with neighbouring channels; other strides stay."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias_rows(bias: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """The bias in float32 with a value for each key, neighbouring keys side by side; what is broadcast stays so."""
    if bias is None:
        return None
    bias = bias.to(torch.float32).expand(-1, -1, -1, keys)
    return bias if bias.stride(-1) == 1 else bias.contiguous()


def _bytes(key_mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if key_mask is None else key_mask.contiguous()


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, ...]:
    batch, queries, heads, head_dim = q.shape
    bias_strides = (0, 0, 0) if bias is None else bias.expand(batch, heads, queries, -1).stride()[:3]
    sizes = (batch, heads, queries, k.shape[1], head_dim)
    return (*sizes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides)


def _settings(
    dtype: torch.dtype, causal: bool, scale: float, dropout_p: float, seed: torch.Tensor | None
) -> tuple[int | float, ...]:
    return _native.dtype_code(dtype), int(causal), scale, dropout_p, unsigned(seed), torch.get_num_threads()
