"""Inputs of the frozen linear kernels, and what they compute in plain PyTorch, for tests on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tlfast.ops.frozen_linear.formats import NF4

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def quantised(
    rows: int, outputs: int, depth: int, dtype: torch.dtype, bias: bool = True, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor | None, ...]:
    """values, row_scale, weight, weight_scale, bias of a layer whose outputs are of order one."""
    on = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    x, w = torch.randn(rows, depth, **on), torch.randn(outputs, depth, **on)
    largest = 127.0 if dtype == torch.int8 else 448.0
    tensors = []
    for numbers, size in ((x, 1.0), (w, depth**-0.5)):
        scale = numbers.abs().amax(1) / largest
        scaled = numbers / scale[:, None]
        tensors += [(scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale * size]
    return (*tensors, torch.randn(outputs, **on) if bias else None)


def plain_quantised(
    inputs: tuple, activation: str, out_dtype: torch.dtype, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The formula, computed in `dtype`."""
    values, row_scale, weight, weight_scale, bias = (None if tensor is None else tensor.to(dtype) for tensor in inputs)
    y = values @ weight.T * row_scale[:, None] * weight_scale
    return ACTIVATIONS[activation](y if bias is None else y + bias).to(out_dtype)


def nf4(
    rows: int, outputs: int, depth: int, dtype: torch.dtype, bias: bool = True, device: str = "cpu", seed: int = 0
) -> tuple[torch.Tensor | None, ...]:
    """x, codes, group_scale_codes, row_scale, bias; every code and group scale occurs."""
    on = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def bytes_of(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, **on)

    x = torch.randn(rows, depth, **on).to(dtype)
    scale = (torch.rand(outputs, **on) + 0.5) * 3 * depth**-0.5
    added = torch.randn(outputs, **on) if bias else None
    return x, bytes_of(outputs, depth // 2), bytes_of(outputs, depth // 64), scale, added


def nf4_weight(inputs: tuple, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) that codes and scales stand for, computed in `dtype`."""
    _, codes, group_scale_codes, row_scale, _ = inputs
    numbers = torch.tensor(NF4, dtype=dtype, device=codes.device)
    unpacked = torch.stack((numbers[(codes & 15).long()], numbers[(codes >> 4).long()]), -1).flatten(1)
    groups = (group_scale_codes.to(dtype) / 255).repeat_interleave(64, 1)
    return unpacked * groups * row_scale.to(dtype)[:, None]


def plain_nf4(inputs: tuple, activation: str, dtype: torch.dtype) -> torch.Tensor:
    """What plain PyTorch gives in `dtype`, the weight unpacked in float32 at least and rounded once."""
    weight = nf4_weight(inputs, torch.promote_types(dtype, torch.float32)).to(dtype)
    x, bias = inputs[0], inputs[4]
    return ACTIVATIONS[activation](F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)))
