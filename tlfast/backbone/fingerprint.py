"""What identifies a frozen backbone: a hash of everything its taps depend on."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from .sharding import gathered, is_sharded

_AT_ONCE = 8  # tensors that are on the host beside the model, where that is on a GPU
_NOT_READ = ("pooler.", "lm_head.")  # of a model without its head; loaders draw a missing pooler at random


def fingerprint(weights: nn.Module | dict[str, torch.Tensor], settings: Any) -> str:
    """SHA-256 over the settings' repr and the dtypes, shapes and bytes of the persistent tensors.

    Neither names nor order count: transformers renames modules from version to version. The same weights give the same
    value on every device, sharded or not; where they are sharded every process must call this. Costs one read of the
    weights (about 1 GB/s a core).
    """
    tensors = weights.state_dict(keep_vars=True) if isinstance(weights, nn.Module) else weights
    # a tied tensor counts once; a process may hold nothing of a sharded one, but that is the same object
    distinct = {
        id(tensor) if is_sharded(tensor) else tensor.data_ptr(): tensor
        for name, tensor in sorted(tensors.items())
        if not name.startswith(_NOT_READ)
    }
    parts = sorted(_digests(list(distinct.values())))
    return hashlib.sha256("".join([repr(settings), *parts]).encode()).hexdigest()


def _digests(tensors: list[torch.Tensor]) -> list[str]:
    """Several at a time; sharded ones in the order in which all processes ask each other for their parts."""
    if any(map(is_sharded, tensors)):
        return [_digest(tensor) for tensor in tensors]
    with ThreadPoolExecutor(max(1, min(_AT_ONCE, os.cpu_count() or 1))) as pool:
        return list(pool.map(_digest, tensors))


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}:{tuple(tensor.shape)};".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    flat = gathered(tensor.detach()).cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
