"""Tensors that lie end to end in memory, as query, key and value do so that one product gives all three."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .linear import FrozenLinear


def memory_of(tensor: torch.Tensor) -> Any:
    """What two tensors share that are one."""
    address = tensor.data_ptr() if tensor.numel() else id(tensor)
    return address, tensor.dtype, tuple(tensor.shape), tensor.stride()


def end_to_end(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Those of the tensors that lie behind each other in one piece of memory, as one tensor would: query, key, value.

    Each list has at least two, of one dtype and of rows of one shape.
    """
    ordered = sorted((x for x in tensors if x.numel() and x.is_contiguous()), key=lambda x: x.data_ptr())
    runs: list[list[torch.Tensor]] = []
    for tensor in ordered:
        last = runs[-1][-1] if runs else None
        if last is not None and _follows(last, tensor):
            runs[-1].append(tensor)
        elif last is None or memory_of(last) != memory_of(tensor):
            runs.append([tensor])
    return [run for run in runs if len(run) > 1]


def _follows(last: torch.Tensor, tensor: torch.Tensor) -> bool:
    return (
        last.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        and last.data_ptr() + last.nbytes == tensor.data_ptr()
        and last.dtype == tensor.dtype
        and last.dim() > 0
        and last.shape[1:] == tensor.shape[1:]
    )


@contextmanager
def kept_together(model: nn.Module) -> Iterator[None]:
    """Inside, the buffers of stored layers may be exchanged for others; what lay end to end does so again after it."""
    owners = {
        id(x): (module, name)
        for module in model.modules()
        if isinstance(module, FrozenLinear)
        for name, x in module.named_buffers()
    }
    runs = end_to_end([module.get_buffer(name) for module, name in owners.values()])
    yield
    for run in runs:
        places = [owners[id(tensor)] for tensor in run]
        moved = [module.get_buffer(name) for module, name in places]
        if all(before is after for before, after in zip(run, moved, strict=True)):
            continue
        pieces = torch.cat(moved).split([len(tensor) for tensor in moved])
        for (module, name), piece in zip(places, pieces, strict=True):
            module._buffers[name] = piece
