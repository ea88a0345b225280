"""What a GPU can do."""

from __future__ import annotations

import functools

import torch


@functools.cache
def capability(device: torch.device) -> int:
    """The compute capability of a CUDA device, 90 for 9.0.

    Triton's interpreter runs on the CPU what any GPU does.
    """
    if device.type == "cpu":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
