"""Starting weights of a side network, from the backbone's own weights and a few batches; no backward pass is run.

Side block j stands behind the tap of backbone block i and starts from block i's weights, cut down to the side
network's width in two steps:
- inside a block, keep the rows that matter: per head the query/key channels with the largest E[q^2] E[k^2] and the
  value channels with the largest E[v^2] |W_o column|^2, and the feed-forward units with the largest
  E[a^2] |W_down column|^2 (the energy each contributes to the block's output);
- between blocks, read and write the residual stream through a fixed basis P (D, R): the R channels with the largest
  variance ("prune"), or the first R principal components of the taps ("pca"). Rungs start as P^T.
Ladder side-tuning (Sung et al. 2022, section 3.3) ranks all rows together, which mixes heads, and needs a backward
pass through the backbone for its Fisher score.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backbone import FrozenBackbone
from ..backbone.families import submodule
from .blocks import SideBlock
from .side_network import SideNetwork


@dataclass
class Moments:
    """Running sums over valid tokens: count, sum and sum of outer products of the stream; energies by block."""

    count: int
    total: torch.Tensor  # (D,)
    outer: torch.Tensor  # (D, D)
    energy: dict[tuple[int, str], torch.Tensor]  # mean squares are these over count

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.outer / self.count - torch.outer(self.mean, self.mean)


def initialise(side: SideNetwork, backbone: FrozenBackbone, init: str, batches: Iterable[Mapping[str, Any]]) -> None:
    """Overwrite the side network's weights. init: "prune", "pca", or "random" (which leaves them as they are)."""
    if init == "random":
        return
    moments = measure(backbone, batches)
    basis = _select(moments, side.embedding.out_features) if init == "prune" else _principal(moments, side)
    centre = moments.mean
    with torch.no_grad():
        for linear in (side.embedding, *side.rungs):
            linear.weight.copy_(basis.T)
            linear.bias.copy_(-(basis.T @ centre.float()) if init == "pca" else torch.zeros_like(linear.bias))
        for index, block in zip(backbone.tap_indices, side.blocks, strict=True):
            assert isinstance(block, SideBlock)
            _cut(block, backbone, index, basis, moments)


@torch.no_grad()
def measure(backbone: FrozenBackbone, batches: Iterable[Mapping[str, Any]]) -> Moments:
    """Second moments of the taps and energies of the blocks' inner channels, over the batches' valid tokens."""
    width, device = backbone.block_spec.width, next(backbone.parameters()).device
    zeros = torch.zeros(width, dtype=torch.float64, device=device)
    moments = Moments(0, zeros, torch.outer(zeros, zeros), {})
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "labels"}
        mask = inputs.get("attention_mask")
        with _EnergyHooks(backbone, moments, None if mask is None else mask.bool()):
            output = backbone(**inputs, packed=True)
        moments.count += output.embedding.shape[0]
        for tap in output.taps:
            tap = tap.double() / len(output.taps) ** 0.5
            moments.outer += tap.T @ tap
            moments.total += tap.sum(0) / len(output.taps) ** 0.5
    if moments.count == 0:
        raise ValueError("calibration: the batches hold no token; pass at least one batch with text")
    return moments


class _EnergyHooks:
    """While entered, adds each block's squared queries, keys, values and feed-forward activations to the moments."""

    def __init__(self, backbone: FrozenBackbone, moments: Moments, mask: torch.Tensor | None) -> None:
        self.backbone, self.moments, self.mask = backbone, moments, mask
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        parts = self.backbone.family.parts
        for index in self.backbone.tap_indices:
            block = self.backbone.blocks[index]
            for name in ("query", "key", "value"):
                hook = self._add((index, name))
                self.handles.append(submodule(block, getattr(parts, name)).register_forward_hook(hook))
            down = submodule(block, parts.down)
            self.handles.append(down.register_forward_hook(self._add((index, "down"), of_input=True)))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _add(self, key: tuple[int, str], of_input: bool = False) -> Any:
        thread = threading.get_ident()  # others may run the shared model at the same time

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if threading.get_ident() != thread:
                return
            x = args[0] if of_input else output
            x = x.reshape(-1, x.shape[-1]) if self.mask is None else x[self.mask]
            total = x.double().square().sum(0)
            self.moments.energy[key] = self.moments.energy.get(key, 0) + total

        return hook


def _select(moments: Moments, width: int) -> torch.Tensor:
    """(D, R): one-hot columns for the R channels of largest variance, in their order."""
    variance = torch.diagonal(moments.covariance)
    chosen = variance.topk(width).indices.sort().values
    return torch.eye(variance.numel(), device=variance.device)[:, chosen]


def _principal(moments: Moments, side: SideNetwork) -> torch.Tensor:
    """(D, R): the first R principal components of the taps, signs fixed so that runs agree."""
    _, vectors = torch.linalg.eigh(moments.covariance)
    basis = vectors.flip(1)[:, : side.embedding.out_features]
    peak = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * peak.sign()).float()


def _cut(block: SideBlock, backbone: FrozenBackbone, index: int, basis: torch.Tensor, moments: Moments) -> None:
    """Fill a side block from backbone block `index`, seen through the basis."""
    parts, heads = backbone.family.parts, block.spec.heads
    source = {name: submodule(backbone.blocks[index], path) for name, path in vars(parts).items()}
    energy = {name: moments.energy[index, name] for name in ("query", "key", "value", "down")}
    into_output = source["attention_output"].weight.double().square().sum(0)
    into_down = source["down"].weight.double().square().sum(0)
    query_key = _per_head(energy["query"] * energy["key"], heads, block.spec.width // heads)
    value = _per_head(energy["value"] * into_output, heads, block.spec.width // heads)
    units = (energy["down"] * into_down).topk(block.spec.hidden).indices.sort().values

    rows = {"query": query_key, "key": query_key, "value": value}
    block.qkv.weight.copy_(torch.cat([source[name].weight[kept] @ basis for name, kept in rows.items()]))
    block.qkv.bias.copy_(torch.cat([source[name].bias[kept] for name, kept in rows.items()]))
    block.attention_output.weight.copy_(basis.T @ source["attention_output"].weight[:, value])
    block.attention_output.bias.copy_(basis.T @ source["attention_output"].bias)
    block.up.weight.copy_(source["up"].weight[units] @ basis)
    block.up.bias.copy_(source["up"].bias[units])
    block.down.weight.copy_(basis.T @ source["down"].weight[:, units])
    block.down.bias.copy_(basis.T @ source["down"].bias)
    for name, norm in (("attention_norm", block.attention_norm), ("feed_forward_norm", block.feed_forward_norm)):
        norm.weight.copy_(basis.square().T @ source[name].weight)
        norm.bias.copy_(basis.T @ source[name].bias)


def _per_head(importance: torch.Tensor, heads: int, kept: int) -> torch.Tensor:
    """Indices of the `kept` most important channels of each head, in their order."""
    by_head = importance.view(heads, -1)
    chosen = by_head.topk(kept, dim=1).indices.sort(dim=1).values
    return (chosen + torch.arange(heads, device=importance.device)[:, None] * by_head.shape[1]).flatten()
