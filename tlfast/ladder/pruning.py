"""Cut a backbone block down to a side block: which rows are kept, and their weights seen through a basis."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backbone.families import gate_of
from ..backbone.parts import AttentionParts, Part, norm_weight, submodule
from ..backbone.stack import Stack
from .attention import SideAttention, SideCrossAttention
from .blocks import SideBlock, SideFeedForward
from .moments import CROSS, Moments


def cut(
    block: SideBlock, stack: Stack, index: int, basis: torch.Tensor, memory: torch.Tensor | None, moments: Moments
) -> None:
    """Fill a side block from block `index` of a stack, seen through the basis (D, R).

    memory: the basis of the encoder that a decoder's block reads. Norms behind a layer that the backbone has and the
    side block has not are left out.
    """
    assert stack.parts is not None
    source, parts = stack.blocks[index], stack.parts
    energy = {name: value for (of, name), value in moments.energy.items() if of == index}
    _cut_attention(block.attention, source, parts.attention, energy, basis)
    copy_norm(block.attention_norm, submodule(source, parts.attention.norm), basis)
    if block.cross_attention is not None and parts.cross_attention is not None and memory is not None:
        crossing = {name.removeprefix(CROSS): value for name, value in energy.items() if name.startswith(CROSS)}
        _cut_cross(block.cross_attention, source, parts.cross_attention, crossing, basis, memory)
        copy_norm(block.cross_attention_norm, submodule(source, parts.cross_attention.norm), basis)
    _cut_feed_forward(block.feed_forward, stack, source, energy["down"], basis)
    copy_norm(block.feed_forward_norm, submodule(source, parts.feed_forward.norm), basis)
    for norm, path in (
        (block.attention_output_norm, parts.attention.output_norm),
        (block.feed_forward_output_norm, parts.feed_forward.output_norm),
    ):
        if path is not None:
            copy_norm(norm, submodule(source, path), basis)


def copy_norm(norm: Any, source: nn.Module, basis: torch.Tensor) -> None:
    """A norm's factor and offset, seen through the basis; nn.Identity in the backbone leaves the side norm as it is."""
    weight = norm_weight(source)
    if weight is not None:
        norm.weight.copy_(basis.square().T @ weight)
    bias = getattr(source, "bias", None)
    if bias is not None and getattr(norm, "bias", None) is not None:
        norm.bias.copy_(basis.T @ bias)


def relative_bias(stack: Stack) -> torch.Tensor:
    """(buckets, H): T5 keeps one bias for a stack, in its first block."""
    return submodule(stack.blocks[0], "layer.0.SelfAttention.relative_attention_bias").weight


def _cut_attention(
    side: SideAttention, source: nn.Module, parts: AttentionParts, energy: dict[str, torch.Tensor], basis: torch.Tensor
) -> None:
    spec = side.spec
    query, key, value, output = (Part.of(source, path) for path in (parts.query, parts.key, parts.value, parts.output))
    full = query.weight.shape[0] // spec.heads
    if spec.positions == "rotary":
        kept = _every_pair(full, spec.head_dim, basis.device).expand(spec.kv_heads, -1)
    else:
        queries = _by_head(energy["query"], spec.heads).unflatten(0, (spec.kv_heads, -1)).sum(1)
        kept = _largest(queries * _by_head(energy["key"], spec.kv_heads), spec.head_dim)
    values = _kept_values(energy["value"], output, spec.heads, spec.kv_heads, spec.head_dim)
    of_heads, of_keys = _rows(kept, spec.heads, full), _rows(kept, spec.kv_heads, full)
    rows = ((query, of_heads), (key, of_keys), (value, _rows(values, spec.kv_heads, full)))
    _copy_rows(side.qkv, [(part, index, basis) for part, index in rows])
    _copy_columns(side.output, output, _rows(values, spec.heads, full), basis, _scale(source, parts.output_scale))
    for norm, path in ((side.query_norm, parts.query_norm), (side.key_norm, parts.key_norm)):
        if norm is not None and path is not None:
            norm.weight.copy_(submodule(source, path).weight[kept[0]])


def _cut_cross(
    side: SideCrossAttention,
    source: nn.Module,
    parts: AttentionParts,
    energy: dict[str, torch.Tensor],
    basis: torch.Tensor,
    memory: torch.Tensor,
) -> None:
    spec = side.spec
    query, key, value, output = (Part.of(source, path) for path in (parts.query, parts.key, parts.value, parts.output))
    full = query.weight.shape[0] // spec.heads
    kept = _largest(_by_head(energy["query"], spec.heads) * _by_head(energy["key"], spec.heads), spec.head_dim)
    values = _kept_values(energy["value"], output, spec.heads, spec.heads, spec.head_dim)
    kept_rows, value_rows = _rows(kept, spec.heads, full), _rows(values, spec.heads, full)
    _copy_rows(side.query, [(query, kept_rows, basis)])
    _copy_rows(side.key_value, [(key, kept_rows, memory), (value, value_rows, memory)])
    _copy_columns(side.output, output, value_rows, basis, _scale(source, parts.output_scale))


def _cut_feed_forward(
    side: SideFeedForward, stack: Stack, source: nn.Module, energy: torch.Tensor, basis: torch.Tensor
) -> None:
    assert stack.parts is not None
    parts = stack.parts.feed_forward
    up, down, gate = Part.of(source, parts.up), Part.of(source, parts.down), gate_of(stack.parts, source)
    units = (energy * down.weight.double().square().sum(0)).topk(side.up.out_features).indices.sort().values
    _copy_rows(side.up, [(up, units, basis)])
    if side.gate is not None and gate is not None:
        _copy_rows(side.gate, [(gate, units, basis)])
    _copy_columns(side.down, down, units, basis, _scale(source, parts.output_scale))


def _copy_rows(linear: nn.Linear, parts: list[tuple[Part, torch.Tensor, torch.Tensor]]) -> None:
    """The chosen outputs of one layer after the other, reading the stream through a basis."""
    linear.weight.copy_(torch.cat([part.weight[rows] @ basis for part, rows, basis in parts]))
    if linear.bias is not None:
        linear.bias.copy_(torch.cat([_bias(part)[rows] for part, rows, _ in parts]))


def _copy_columns(
    linear: nn.Linear, part: Part, columns: torch.Tensor, basis: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """The layer that reads the chosen channels, writing the stream through the basis; scale is of its outputs (D,)."""
    writes = basis if scale is None else basis * scale[:, None]
    linear.weight.copy_(writes.T @ part.weight[:, columns])
    if linear.bias is not None:
        linear.bias.copy_(writes.T @ _bias(part))


def _bias(part: Part) -> torch.Tensor:
    bias = part.bias
    return part.weight.new_zeros(part.weight.shape[0]) if bias is None else bias


def _scale(source: nn.Module, path: str | None) -> torch.Tensor | None:
    return None if path is None else submodule(source, path)


def _kept_values(energy: torch.Tensor, output: Part, heads: int, kv_heads: int, kept: int) -> torch.Tensor:
    """(kv_heads, kept) value channels by E[v^2] |W_o column|^2, summed over the query heads that read them."""
    columns = _by_head(output.weight.double().square().sum(0), heads).unflatten(0, (kv_heads, -1)).sum(1)
    return _largest(_by_head(energy, kv_heads) * columns, kept)


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.view(heads, -1)


def _largest(importance: torch.Tensor, kept: int) -> torch.Tensor:
    """(heads, kept) indices of the most important channels of each head, in their order."""
    return importance.topk(kept, dim=1).indices.sort(dim=1).values


def _every_pair(full: int, kept: int, device: torch.device) -> torch.Tensor:
    """(kept,) channels: those of every (full / kept)-th pair; channel i is rotated with channel i + full / 2."""
    first = torch.arange(0, full // 2, full // kept, device=device)
    return torch.cat((first, first + full // 2))


def _rows(kept: torch.Tensor, heads: int, full: int) -> torch.Tensor:
    """Rows of all heads' channels: kept (kv_heads, channels) indices inside a head, shared by the heads of a group."""
    of_head = kept.repeat_interleave(heads // kept.shape[0], dim=0)
    return (of_head + full * torch.arange(heads, device=kept.device)[:, None]).flatten()
