"""The weights of a stack of blocks as the native library reads them: addresses and sizes in one piece of memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ... import _native
from ..frozen_linear import FrozenWeight

# enum tl_weight_format in csrc/tlfast.h
_FORMATS = {"bf16": 0, "int8": 1, "nf4": 2, "int8_weight_only": 3}


class NormWeights(NamedTuple):
    """weight and bias (D,) in float32, contiguous, or None each, and eps."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


class BlockWeights(NamedTuple):
    """The weights of a block, and the farthest position its attention sees on either side; None: any."""

    qkv: FrozenWeight
    output: FrozenWeight
    up: FrozenWeight
    down: FrozenWeight
    attention_norm: NormWeights
    feed_forward_norm: NormWeights
    window: int | None = None


class Table:
    """struct tl_block of each block, and struct tl_norm of the norm behind them; keeps the weights alive."""

    def __init__(self, blocks: Sequence[BlockWeights], final_norm: NormWeights | None) -> None:
        self.blocks, self.final_norm = tuple(blocks), final_norm
        self.rows = _bytes(b"".join(map(_block, blocks)))
        self.final_row = None if final_norm is None else _bytes(_norm(final_norm))


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)


def _block(block: BlockWeights) -> bytes:
    linears = b"".join(map(_linear, (block.qkv, block.output, block.up, block.down)))
    window = struct.pack("q", -1 if block.window is None else block.window)
    return linears + _norm(block.attention_norm) + _norm(block.feed_forward_norm) + window


def _linear(weight: FrozenWeight) -> bytes:
    tensors = (weight.values, weight.scale, weight.group_scale, weight.smooth, weight.bias)
    sizes = (weight.inputs, weight.outputs, _FORMATS[weight.precision], weight.gated)
    return struct.pack("9q", *map(_native.pointer, tensors), *sizes)


def _norm(norm: NormWeights) -> bytes:
    return struct.pack("2qd", _native.pointer(norm.weight), _native.pointer(norm.bias), norm.eps)
