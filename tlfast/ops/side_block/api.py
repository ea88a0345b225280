"""A whole transformer block of a side network in one operation."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from . import native, reference
from .autograd import SideBlock
from .weights import ACTIVATIONS, NORMS, PLACEMENTS, PRECISIONS, BlockSettings, BlockWeights

IMPLEMENTATIONS = ("reference", "native")


def side_block(
    x: torch.Tensor,
    weights: BlockWeights,
    settings: BlockSettings,
    *,
    key_mask: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Self-attention and a feed-forward, each with dropout, residual sum and norm.

    placement "post": y = norm(x + dropout(attention(x))), out = norm(y + dropout(feed_forward(y)));
    "pre": y = x + dropout(attention(norm(x))), out = y + dropout(feed_forward(norm(y))).

    Args:
        x: (B, S, R).
        weights, settings: of the block; I = heads head_dim. With settings.precision "bf16" the operands of the four
            layers' products, and in the backward pass of their gradients', are rounded to bfloat16, as under autocast;
            sums, and everything between the products, stay in float32, as do all tensors here.
        key_mask: (B, S) bool, True where a token is; None: everywhere. A query that sees no key attends to nothing.
        seeds: (3,) int64, of the dropout in the attention, behind it and behind the feed-forward, as
            `torch.randint(2**62, (3,))` draws them; needed where settings have a dropout. The masks are those of
            `tlfast.ops.attention` and `tlfast.ops.dropout`, the same in every implementation.
        impl: "auto", "reference" (plain PyTorch) or "native" (C++, CPU, float32). A named one runs or raises.

    Returns:
        (B, S, R), zeros behind the last token of a sequence. Gradients reach x and the weights, once (no double
        backward, except with impl="reference").

    Cost, for M = B S rows: 2 M (4 R I + 2 R F) flops for the products and 4 M S I for the attention forward, about
    three times as much backward; the bytes of x in and of the result out, what lies between stays in the cache. Kept
    for the backward pass: x, the heads' output (M I), with placement "post" the last sum (M R), and two numbers a row
    and head; the rest is recomputed, a strip of rows at a time.

    Raises:
        ValueError: shapes, settings, mask or seeds that do not fit; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.1; for "pre" Xiong et al. 2020 (arXiv 2002.04745).
    """
    _check_settings(settings)
    _check(x, weights, settings, key_mask)
    drawn = _check_seeds(settings, seeds)

    def refuses(name: str) -> str | None:
        if name == "native" and not all(t is None or t.dtype == torch.float32 for t in (x, *weights)):
            return f"it takes float32, and not all of x ({x.dtype}) and the weights are; use impl='reference'"
        return None

    chosen = _dispatch.choose("side_block", impl, IMPLEMENTATIONS, x.device.type, refuses)
    if chosen == "reference":
        return reference.side_block(x, weights, settings, key_mask, drawn)
    if _dispatch.runs_eagerly(x, *weights):
        return native.forward(x, weights, settings, key_mask, drawn)[0]
    return SideBlock.apply(x, key_mask, drawn, settings, *weights)


def _check_settings(settings: BlockSettings) -> None:
    for name, allowed in (
        ("activation", ACTIVATIONS),
        ("placement", PLACEMENTS),
        ("norm", NORMS),
        ("precision", PRECISIONS),
    ):
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, not {getattr(settings, name)!r}")
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), not {getattr(settings, name)}")
    if not (settings.eps > 0 and math.isfinite(settings.eps)):
        raise ValueError(f"eps must be positive and finite, not {settings.eps}")


def _check(x: torch.Tensor, w: BlockWeights, settings: BlockSettings, key_mask: torch.Tensor | None) -> None:
    if x.dim() != 3 or x.shape[-1] == 0:
        raise ValueError(f"x must be (B, S, R) with R >= 1, not {tuple(x.shape)}")
    batch, length, width = x.shape
    inner, hidden = w.output_weight.shape[-1], w.up_weight.shape[0]
    if settings.heads < 1 or inner % settings.heads or inner == 0:
        raise ValueError(f"heads must divide the {inner} inputs of output_weight, not be {settings.heads}")
    shapes = {
        "key_mask": (batch, length),
        "qkv_weight": (3 * inner, width),
        "qkv_bias": (3 * inner,),
        "output_weight": (width, inner),
        "up_weight": (hidden, width),
        "up_bias": (hidden,),
        "down_weight": (width, hidden),
    }
    for name, tensor in {"key_mask": key_mask, **w._asdict()}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
        expected = shapes.get(name, (width,))
        if tensor.shape != expected:
            raise ValueError(f"{name} must be {expected} as x and the weights are, not {tuple(tensor.shape)}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be bool, True where a token is, not {key_mask.dtype}: use mask.bool()")


def _check_seeds(settings: BlockSettings, seeds: torch.Tensor | None) -> torch.Tensor | None:
    if settings.attention_dropout == 0 and settings.hidden_dropout == 0:
        return None
    if not isinstance(seeds, torch.Tensor) or seeds.shape != (3,) or seeds.dtype != torch.int64:
        given = type(seeds).__name__ if not isinstance(seeds, torch.Tensor) else f"{seeds.dtype} {tuple(seeds.shape)}"
        raise ValueError(
            f"seeds must be a (3,) int64 tensor where settings have a dropout, not {given}:"
            " draw it with torch.randint(2**62, (3,))"
        )
    return seeds
