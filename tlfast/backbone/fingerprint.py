"""What identifies a frozen backbone: a hash of everything its taps depend on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def fingerprint(parts: dict[str, nn.Module], settings: Any) -> str:
    """SHA-256 over the settings' repr and names, dtypes, shapes and bytes of the modules' persistent tensors.

    The same weights give the same value on every device. Costs one read of the weights (about 1 GB/s).
    """
    digest = hashlib.sha256(repr(settings).encode())
    for part, module in parts.items():
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
