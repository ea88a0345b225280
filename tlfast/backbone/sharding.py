"""A backbone whose weights torch.distributed.fsdp.fully_shard has spread over processes as DTensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, those of the modules that are sharded have plain tensors as weights. Every process must enter."""
    sharded: list[Any] = [module for module in modules if hasattr(module, "unshard")]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


@contextmanager
def spread_after_use(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, those of the modules that are sharded are spread again after each forward, in a backward pass too.

    There fully_shard keeps them whole: it takes a forward for one that is repeated for the backward pass behind it.
    """
    sharded: list[Any] = [module for module in modules if hasattr(module, "reshard")]
    handles = [module.register_forward_hook(lambda module, *_: module.reshard()) for module in sharded]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gathered(tensor: Any) -> torch.Tensor:
    """The whole of a tensor. Where it is sharded every process must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Any) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")
