"""Scaled dot-product attention that never keeps an Sq x Sk map for the backward pass."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from ..dropout import check_dropout
from . import reference, sdpa
from .autograd import Attention, kernels

IMPLEMENTATIONS = ("reference", "native", "triton", "sdpa", "recompute")

_TRITON_HEAD_DIM = 64
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """dropout(softmax(scale * q k^T + bias)) v for each head, recomputed in the backward pass instead of stored.

    Args:
        q: (B, Sq, H, Dh), any strides: slices of one packed projection need no copy.
        k, v: (B, Sk, H, Dh), in the dtype of q.
        bias: added to the scores, (B or 1, H or 1, Sq or 1, Sk or 1), -inf excludes a key; its gradient is summed over
            what is broadcast.
        key_mask: (B, Sk) bool, True where a key may be attended to.
        causal: query i sees keys up to i + Sk - Sq (aligned at the last key, as with a cache).
        scale: of the scores; default Dh ** -0.5.
        dropout_p: probability of dropping a probability, in [0, 1).
        seed: int, or 0-dim int64 tensor as `torch.randint(2**62, ())` draws it; needed where dropout_p > 0. The same
            seed gives the same mask in every implementation (`tlfast.ops.dropout`, row (b H + h) Sq + i, column j), so
            a checkpointed caller draws it outside and passes it in.
        impl: "auto", "reference" (plain formula, keeps the map), "native" (C++), "triton" (GPU, Dh up to 64, no
            bias), "sdpa" (PyTorch's fused CUDA kernels) or "recompute" (plain PyTorch in bounded parts, any device and
            dtype). A named one runs or raises.

    Returns:
        (B, Sq, H, Dh), contiguous, in the dtype of q. A query that sees no key gives zeros and zero gradients. Under
        autocast q, k and v are first cast to autocast's dtype; arithmetic is in float32 (float64 for float64 inputs).
        Gradients reach q, k, v and bias, once (no double backward, except with impl="reference").

    Cost, for M = B H Sq Sk: 4 M Dh flops and M exponentials forward, 10 M Dh and M backward; at least the bytes of q,
    k, v and out, each once. Kept for the backward pass: the inputs as given, out, and two float32 numbers a row,
    (B, H, Sq, 2): the largest score and 1/sum of exponentials (the log-sum-exp, one number, would lose digits).
    "triton" keeps the former times log2(e), and in the backward pass computes exponentials twice: 14 M Dh and 2 M.

    Raises:
        ValueError: shapes, dtypes, devices, dropout_p or seed that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), equation 1; recomputing backward: Dao
    et al., "FlashAttention", 2022 (arXiv 2205.14135), algorithm 4.
    """
    _check(q, k, v, bias, key_mask)
    drawn = check_dropout(dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    device_type = q.device.type
    if q.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)

    def refuses(name: str) -> str | None:
        if name == "sdpa":
            return sdpa.refuses(q, k, bias, key_mask, causal, dropout_p)
        if name in ("native", "triton") and q.dtype not in _KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {q.dtype}; use impl='recompute'"
        return _triton_refuses(q, bias) if name == "triton" else None

    chosen = _dispatch.choose("attention", impl, IMPLEMENTATIONS, device_type, refuses)
    if chosen == "reference":
        return reference.attention(q, k, v, bias, key_mask, causal, scale, dropout_p, drawn)
    if chosen == "sdpa":  # pragma: gpu
        return sdpa.attention(q, k, v, bias, key_mask, causal, scale)
    if _dispatch.runs_eagerly(q, k, v, bias):
        run = kernels(chosen).forward
        return run(q, k, v, bias, key_mask, causal, scale, float(dropout_p), drawn)[0]
    return Attention.apply(q, k, v, bias, key_mask, causal, scale, float(dropout_p), drawn, chosen)


def _triton_refuses(q: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if bias is not None:
        return "it takes no bias; use impl='recompute'"
    if q.shape[-1] > _TRITON_HEAD_DIM:
        return f"its programs hold whole heads, Dh up to {_TRITON_HEAD_DIM}, not {q.shape[-1]}; use impl='recompute'"
    return _dispatch.interpreter_refuses(q.dtype)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, key_mask: torch.Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("bias", bias)):
        if x is None and name == "bias":
            continue
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() != 4:
            given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a floating-point tensor of 4 dimensions, not {given}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, not {x.dtype}")
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
            fits = (q.shape[0], "Sk", *q.shape[2:])
            raise ValueError(f"{name} must be {fits} as q is {tuple(q.shape)}, not {tuple(x.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"v must be {tuple(k.shape)} as k is, not {tuple(v.shape)}")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have at least one channel a head, not shape {tuple(q.shape)}")
    scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias is not None and any(given not in (1, size) for given, size in zip(bias.shape, scores, strict=True)):
        raise ValueError(f"bias must broadcast to (B, H, Sq, Sk) = {scores}, not be {tuple(bias.shape)}")
    if key_mask is None:
        return
    if not isinstance(key_mask, torch.Tensor) or key_mask.dtype != torch.bool:
        actual = key_mask.dtype if isinstance(key_mask, torch.Tensor) else type(key_mask).__name__
        raise ValueError(f"key_mask must be a bool tensor, True = attend, not {actual}: use mask.bool()")
    if key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask must be (B, Sk) = {tuple(k.shape[:2])}, not {tuple(key_mask.shape)}")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask is on {key_mask.device} and q on {q.device}: move them to one device")
