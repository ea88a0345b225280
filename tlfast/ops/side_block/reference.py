"""A side block in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._activations import ACTIVATIONS
from ..attention.reference import attention
from ..dropout import dropout
from .weights import BlockSettings, BlockWeights


def side_block(
    x: torch.Tensor,
    w: BlockWeights,
    settings: BlockSettings,
    key_mask: torch.Tensor | None,
    seeds: torch.Tensor | None,
) -> torch.Tensor:
    attention_seed, output_seed, feed_forward_seed = (None,) * 3 if seeds is None else seeds.unbind()
    norms = ((w.attention_norm_weight, w.attention_norm_bias), (w.feed_forward_norm_weight, w.feed_forward_norm_bias))
    post = settings.placement == "post"

    y = x if post else _norm(x, *norms[0], settings)
    q, k, v = _linear(y, w.qkv_weight, w.qkv_bias, settings).unflatten(-1, (3, settings.heads, -1)).unbind(-3)
    if settings.attention_dropout == 0:
        attention_seed = None
    attended = attention(
        q, k, v, None, key_mask, settings.causal, settings.scale, settings.attention_dropout, attention_seed
    )
    x = x + _dropped(_linear(attended.flatten(-2), w.output_weight, w.output_bias, settings), settings, output_seed)
    if post:
        x = _norm(x, *norms[0], settings)

    y = x if post else _norm(x, *norms[1], settings)
    hidden = ACTIVATIONS[settings.activation](_linear(y, w.up_weight, w.up_bias, settings))
    x = x + _dropped(_linear(hidden, w.down_weight, w.down_bias, settings), settings, feed_forward_seed)
    if post:
        x = _norm(x, *norms[1], settings)
    return x if key_mask is None else x.masked_fill(behind_the_last_token(key_mask)[..., None], 0)


def behind_the_last_token(key_mask: torch.Tensor) -> torch.Tensor:
    """(B, S) bool, True in the positions that no token follows or stands in."""
    return key_mask.flip(1).cumsum(1).flip(1) == 0


def _linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, settings: BlockSettings) -> torch.Tensor:
    if settings.precision == "bf16":
        x, w = x.bfloat16().to(x.dtype), w.bfloat16().to(w.dtype)
    return F.linear(x, w, b)


def _dropped(x: torch.Tensor, settings: BlockSettings, seed: torch.Tensor | None) -> torch.Tensor:
    return x if settings.hidden_dropout == 0 or seed is None else dropout(x, settings.hidden_dropout, seed)


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: BlockSettings) -> torch.Tensor:
    if settings.norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, settings.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, settings.eps)
