"""The cross-entropy of a frozen linear layer's outputs, such as a language model's head, without all its logits."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from ..frozen_linear import FrozenWeight
from . import reference
from .autograd import LinearCrossEntropy, loss_alone
from .head import Head

IMPLEMENTATIONS = ("reference", "recompute", "triton")
REDUCTIONS = ("mean", "sum")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_KERNEL_DTYPES, torch.float64)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | FrozenWeight,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of softmax(cap tanh(W (scale h) / cap) + bias) and labels, for a W that is not trained.

    Args:
        hidden: (..., D) in float32, bfloat16 or float16, and float64 for a plain weight. Under autocast it is read in
            autocast's dtype. Products are computed in it, all else in float32 (float64).
        weight: W (V, D), a tensor, read in the dtype of hidden, or a FrozenWeight, not gated and without a bias of its
            own. It gets no gradient. What an int8 weight's product rounds of hidden counts as not rounded.
        labels: (...) int64 in [0, V), or ignore_index where a token has none. On the CPU others are refused. A GPU
            would have to be waited for: with "triton" they make the loss and the token's gradient NaN, with the other
            implementations PyTorch's assertion ends the process.
        bias: (V,) or None, no gradient. scale: a number. cap: of the logits (Gemma 2), None for none.
        reduction: "mean" over the tokens that have a label (NaN where there is none, as in PyTorch), or "sum".
        impl: "auto", "reference" (plain PyTorch, holds all logits), "recompute" (plain PyTorch, a part of the tokens at
            a time) or "triton" (GPU, the same with one kernel between PyTorch's products; not float64). A named one
            runs or raises, it never falls back.

    Returns:
        the loss, 0-dim in float32 (float64 for float64). The gradient reaches hidden, once ("reference": any number of
        times).

    Cost, for T tokens: 4 T V D flops, with which the backward is done but for a factor. Kept: T D numbers in the dtype
    of hidden. A FrozenWeight is also needed dequantised.
        "recompute": T counts the tokens with a label, and it waits on a GPU to know how many they are. Beside what is
            kept at most max(2^22, T D) logits exist at once in float32, twice that with a cap.
        "triton": waits for nothing and multiplies tokens without a label, too: where most have none, "recompute" does
            less. At most max(2^24, T D) logits exist at once, of 128 tokens or a multiple where so many fit, in the
            dtype of hidden; of a FrozenWeight in float32 and once more in that of hidden. Each is written by the
            product, read twice and written over by its gradient; without the gradient read once.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit; weight or bias requires a gradient; unknown
            reduction or impl.
        RuntimeError: the named implementation cannot run here.

    Source: Hsu et al., "Liger Kernel", 2024 (arXiv 2410.10989), section 3.2 (gradient with the loss, in parts); Wijmans
    et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025 (arXiv 2411.09009).
    """
    hidden = _as_autocast(hidden)
    head = Head(weight, bias, scale, cap)
    _check(hidden, head, labels, reduction, ignore_index)

    def refuses(name: str) -> str | None:
        return _triton_refuses(hidden.dtype) if name == "triton" else None

    chosen = _dispatch.choose("linear_cross_entropy", impl, IMPLEMENTATIONS, hidden.device.type, refuses)
    flat, targets = hidden.flatten(0, -2), labels.reshape(-1)
    if chosen == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            loss = reference.linear_cross_entropy(flat, head, targets, ignore_index)
    elif torch.is_grad_enabled() and flat.requires_grad:
        loss = LinearCrossEntropy.apply(flat, targets, head, ignore_index, chosen)
    else:
        loss = loss_alone(flat, targets, head, ignore_index, chosen)
    return loss if reduction == "sum" else loss / (targets != ignore_index).sum()


def _triton_refuses(dtype: torch.dtype) -> str | None:
    if dtype not in _KERNEL_DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}; use impl='recompute'"
    return _dispatch.interpreter_refuses(dtype)


def _as_autocast(hidden: torch.Tensor) -> torch.Tensor:
    if not isinstance(hidden, torch.Tensor) or hidden.dtype not in _DTYPES:
        given = hidden.dtype if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise ValueError(f"hidden must be a tensor in one of {_DTYPES}, not {given}")
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


def _check(hidden: torch.Tensor, head: Head, labels: torch.Tensor, reduction: str, ignored: int) -> None:
    _check_weight(hidden, head)
    vocabulary, width = head.shape
    if hidden.dim() == 0 or hidden.shape[-1] != width:
        raise ValueError(
            f"hidden must be (..., {width}) as weight is ({vocabulary}, {width}), not {tuple(hidden.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be int64 of shape {tuple(hidden.shape[:-1])}, one a token, not {labels.dtype} of "
            f"{tuple(labels.shape)}"
        )
    for name, tensor in (("weight", head), ("labels", labels), ("bias", head.bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: move them to one device")
    if head.bias is not None and (head.bias.shape != (vocabulary,) or head.bias.requires_grad):
        raise ValueError(f"bias must be ({vocabulary},) without a gradient, not {tuple(head.bias.shape)}")
    if not math.isfinite(head.scale) or (head.cap is not None and not 0 < head.cap < math.inf):
        raise ValueError(f"scale must be finite and cap a finite number above 0, not {head.scale} and {head.cap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, not {reduction!r}")
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= vocabulary))]
        if len(wrong):
            raise ValueError(f"labels must be in [0, {vocabulary}) or {ignored}, not {int(wrong[0])}")


def _check_weight(hidden: torch.Tensor, head: Head) -> None:
    weight = head.weight
    if isinstance(weight, FrozenWeight):
        if weight.gated or weight.bias is not None:
            raise ValueError("weight must be a FrozenWeight that is not gated and has no bias: pass bias beside it")
        if hidden.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"hidden must be float32 or bfloat16 with a FrozenWeight, not {hidden.dtype}")
        return
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        given = (
            f"{tuple(weight.shape)} of {weight.dtype}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        )
        raise ValueError(f"weight must be a floating-point matrix (V, D) or a FrozenWeight, not {given}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires a gradient, and this is for a frozen one: use F.cross_entropy for a trained one"
        )
