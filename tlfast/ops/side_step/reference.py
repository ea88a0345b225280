"""A step of a side network in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._activations import ACTIVATIONS
from .weights import StepSettings, StepWeights


def side_step(
    tap: torch.Tensor,
    s: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    w: StepWeights,
    settings: StepSettings,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mu = torch.sigmoid(w.alpha / settings.temperature)
    x = mu * s + (1 - mu) * F.linear(tap, w.rung_weight, w.rung_bias)

    y = x if settings.placement == "post" else _norm(x, w.attention_norm_weight, w.attention_norm_bias, settings)
    heads = F.linear(y, w.qkv_weight, w.qkv_bias).unflatten(-1, (-1, settings.head_dim))
    q, k, v = heads.split((settings.heads, settings.kv_heads, settings.kv_heads), dim=1)
    if w.query_norm is not None and w.key_norm is not None:
        q, k = (F.rms_norm(z, z.shape[-1:], n, settings.eps) for z, n in ((q, w.query_norm), (k, w.key_norm)))
    if rotation is not None:
        q, k = _rotated(q, rotation), _rotated(k, rotation)
    y = F.linear(_attend(q, k, v, keys, values, settings, key_mask, bias), w.output_weight, w.output_bias)
    x = _behind(x, y, w.attention_output_norm, w.attention_norm_weight, w.attention_norm_bias, settings)

    y = x if settings.placement == "post" else _norm(x, w.feed_forward_norm_weight, w.feed_forward_norm_bias, settings)
    hidden, activation = F.linear(y, w.up_weight, w.up_bias), ACTIVATIONS[settings.activation]
    if w.gate_weight is None:
        hidden = activation(hidden)
    else:
        hidden = activation(F.linear(y, w.gate_weight, w.gate_bias)) * hidden
    y = F.linear(hidden, w.down_weight, w.down_bias)
    x = _behind(x, y, w.feed_forward_output_norm, w.feed_forward_norm_weight, w.feed_forward_norm_bias, settings)
    return x, k, v


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    settings: StepSettings,
    key_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    group = settings.heads // settings.kv_heads
    all_keys, all_values = (
        torch.cat((past, new[:, :, None]), dim=2).repeat_interleave(group, dim=1)
        for past, new in ((keys, k), (values, v))
    )
    scores = settings.scale * torch.einsum("bhd,bhpd->bhp", q, all_keys)
    if bias is not None:
        scores = scores + bias
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None], -torch.inf)
    probabilities = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # a query that sees no key gives zeros
    return torch.einsum("bhp,bhpd->bhd", probabilities, all_values).flatten(1)


def _behind(
    x: torch.Tensor,
    y: torch.Tensor,
    output_norm: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    settings: StepSettings,
) -> torch.Tensor:
    if output_norm is not None:
        y = _norm(y, output_norm, None, settings)
    return _norm(x + y, weight, bias, settings) if settings.placement == "post" else x + y


def _norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: StepSettings) -> torch.Tensor:
    if settings.norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, settings.eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, settings.eps)


def _rotated(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cosines, sines = (part[:, None] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines
