"""Starting weights of a side network, from the backbone's own weights and a few batches; no backward pass is run.

Side block j stands behind the tap of backbone block i and starts from block i's weights, cut down to the side
network's width in two steps:
- inside a block, keep the rows that matter: per head the query/key channels with the largest E[q^2] E[k^2] and the
  value channels with the largest E[v^2] |W_o column|^2, and the feed-forward units with the largest
  E[a^2] |W_down column|^2 (the energy each contributes to the block's output). Where queries and keys are rotated by
  their position, every r-th pair of channels, so that the frequencies still span all distances;
- between blocks, read and write the residual stream through a fixed basis P (D, R): the R channels with the largest
  variance ("prune"), or the first R principal components of the taps ("pca"). Rungs start as P^T.
A block whose inside the table of families does not know starts at random, and only its rung as P^T.
Where rungs read their taps through a fixed basis of their own (tap_storage="project": the first k principal components
of that tap), they start as P^T restricted to it, and the mean of what the basis leaves out goes into their bias.
Ladder side-tuning (Sung et al. 2022, section 3.3) ranks all rows together, which mixes heads, and needs a backward
pass through the backbone for its Fisher score.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..backbone import FrozenBackbone
from ..backbone.sharding import whole
from ..backbone.stack import Stack
from .blocks import SideBlock
from .config import LadderConfig
from .moments import Moments, is_distributed, measure
from .pruning import copy_norm, cut, relative_bias
from .side_network import SideNetwork

_SHARE_OF_ALL = 1e-3  # too little to outweigh a direction in which a tap's own tokens differ


def initialise(
    sides: Mapping[str, SideNetwork],
    backbone: FrozenBackbone,
    config: LadderConfig,
    batches: Iterable[Mapping[str, Any]],
) -> None:
    """Overwrite the side networks' weights, by stack, and the bases of their taps; init="random" leaves the weights.

    In a distributed run every process must call this, with its own batches; all start from the same weights.
    """
    init, projects = config.init, config.tap_storage == "project"
    if init == "random" and not projects:
        return
    moments = measure(backbone, batches, sides.keys() if projects else ())
    if projects:
        with torch.no_grad():
            for name, side in sides.items():
                _set_bases(side, moments[name], config.tap_dim)
    if init == "random":
        return
    bases: dict[str, torch.Tensor] = {}
    blocks = {module for stack in backbone.stacks.values() for module in stack.blocks.modules()}
    with torch.no_grad(), whole(module for module in backbone.model.modules() if module not in blocks):
        for name, side in sides.items():
            stack, seen = backbone.stacks[name], moments[name]
            memory = next(iter(bases.values()), None)  # a decoder's blocks read the side encoder, through its basis
            bases[name] = _select(seen, side.width) if init == "prune" else _components(seen.covariance, side.width)
            centre = bases[name].T @ seen.mean.float() if init == "pca" else torch.zeros(side.width)
            _start(side, stack, seen, bases[name], centre, memory)
            if is_distributed():  # other hardware rounds otherwise, and could choose other channels
                for parameter in side.parameters():
                    torch.distributed.broadcast(parameter, 0)


def _set_bases(side: SideNetwork, moments: Moments, width: int) -> None:
    """To each entrance of the side network the principal components of what comes in there.

    Where there are fewer tokens than components, the stream as a whole gives the rest: it has been seen at every tap.
    """
    few = moments.count < width
    if few:
        warnings.warn(
            f"calibration: {moments.count} tokens do not determine {width} principal components of a tap; what they "
            "leave open comes from all taps together. Pass more batches as calibration, or lower tap_dim",
            stacklevel=2,
        )
    for module, spread in zip((side.embedding, *side.rungs), moments.each, strict=True):
        covariance, whole_stream = spread.covariance, moments.covariance
        if few:
            share = covariance.trace() / whole_stream.trace().clamp_min(torch.finfo(torch.float64).tiny)
            covariance = covariance + _SHARE_OF_ALL * share * whole_stream
        basis: Any = module.basis
        basis.copy_(_components(covariance, width).T)
        if is_distributed():
            torch.distributed.broadcast(basis, 0)


def _start(
    side: SideNetwork,
    stack: Stack,
    moments: Moments,
    basis: torch.Tensor,
    centre: torch.Tensor,
    memory: torch.Tensor | None,
) -> None:
    for place, linear in enumerate((side.embedding, *side.rungs)):
        weight, bias = basis.T, -centre
        if linear.basis is not None:
            mean = moments.each[place].mean.float()
            bias = bias + weight @ (mean - linear.basis.T @ (linear.basis @ mean))
            weight = weight @ linear.basis.T
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    if stack.parts is None:
        return
    if stack.final_norm is not None:
        copy_norm(side.norm, stack.final_norm, basis)
    if side.relative_bias is not None:
        with whole(stack.blocks[0].modules()):
            side.relative_bias.weight.copy_(relative_bias(stack))
    for index, block in zip(stack.taps, side.blocks, strict=True):
        assert isinstance(block, SideBlock)
        with whole(stack.blocks[index].modules()):  # one at a time: all of them may not fit
            cut(block, stack, index, basis, memory, moments)


def _select(moments: Moments, width: int) -> torch.Tensor:
    """(D, R): one-hot columns for the R channels of largest variance, in their order."""
    variance = torch.diagonal(moments.covariance)
    chosen = variance.topk(width).indices.sort().values
    return torch.eye(variance.numel(), device=variance.device)[:, chosen]


def _components(covariance: torch.Tensor, width: int) -> torch.Tensor:
    """(D, width): the first principal components, signs fixed so that runs agree."""
    _, vectors = torch.linalg.eigh(covariance)
    basis = vectors.flip(1)[:, :width]
    peak = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * peak.sign()).float()
