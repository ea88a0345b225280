"""Which columns of a linear layer's input are large: what int8 moves into the weights before it rounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .parts import linears_of
from .stack import Stack

_EXAMPLES, _LENGTH = 8, 64  # of the made-up batch
_BALANCE = 0.5  # alpha of SmoothQuant: how much of a column's size the weights take
_SMALLEST = 1e-5


def smoothing(
    base: Any, stacks: dict[str, Stack], calibration: Iterable[dict[str, torch.Tensor]] | None
) -> dict[int, torch.Tensor]:
    """What to multiply each linear layer's inputs by, by the layer's id: balanced column sizes of inputs and weights.

    calibration: batches of the model's inputs; None runs one made-up batch of random tokens or noise: which columns are
    large hardly depends on the text. Empty for a model that cannot be run on either.
    Source: Xiao et al., "SmoothQuant", ICML 2023 (arXiv 2211.10438), equation 4.
    """
    made_up = made_up_batch(base) if calibration is None else None
    batches = [made_up] if made_up is not None else calibration
    if batches is None:
        return {}
    sizes: dict[int, torch.Tensor] = {}
    device = next(base.parameters()).device
    linears = [linear for stack in stacks.values() for block in stack.blocks for linear in linears_of(block)]
    handles = [linear.register_forward_pre_hook(_watch(sizes)) for linear in linears]
    try:
        with torch.no_grad():
            for batch in batches:
                base(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {id(linear): _smooth(linear, sizes[id(linear)]) for linear in linears if id(linear) in sizes}


def _watch(sizes: dict[int, torch.Tensor]) -> Any:
    def before(linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        largest = args[0].detach().abs().flatten(0, -2).amax(0).float()
        known = sizes.get(id(linear))
        sizes[id(linear)] = largest if known is None else torch.maximum(known, largest)

    return before


def _smooth(linear: Any, size: torch.Tensor) -> torch.Tensor:
    columns = linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T  # (K, N)
    weight = columns.detach().abs().amax(1)
    smooth = weight.clamp_min(_SMALLEST) ** (1 - _BALANCE) / size.clamp_min(_SMALLEST) ** _BALANCE
    return (smooth / smooth.log().mean().exp()).contiguous()  # around 1: only ratios count


def made_up_batch(base: Any) -> dict[str, torch.Tensor] | None:
    """Inputs of no meaning, the same every time."""
    config: Any = getattr(base, "config", None)
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None:
        length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
        ids = torch.randint(vocabulary, (_EXAMPLES, max(1, length - 4)), generator=generator)
        return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    if getattr(config, "image_size", None) is not None:
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        return {"pixel_values": torch.randn(_EXAMPLES, config.num_channels, *size, generator=generator)}
    return None
