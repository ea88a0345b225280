"""The weights of a stack of blocks as the native library reads them: addresses and sizes in one piece of memory."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ... import _native
from .._shared_weight import shared_weight
from ..frozen_linear import FrozenWeight
from ..frozen_linear.codes import FORMAT_CODES
from ..frozen_linear.weight import stored_layout
from .shared import SharedWeight


@dataclass(frozen=True)
class Form:
    """What blocks of a stack have in common.

    k_offset, v_offset: where keys and values begin in a row of what qkv gives. scale: of the scores. placement: "post"
    or "pre". activation: as `frozen_linear` names it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    k_offset: int
    v_offset: int
    scale: float
    causal: bool
    placement: str
    rms: bool
    activation: str


class NormWeights(NamedTuple):
    """weight and bias (D,) in float32, contiguous, or None each, and eps."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float


Weight = FrozenWeight | SharedWeight


class BlockWeights(NamedTuple):
    """The weights of a block, and the farthest position its attention sees on either side; None: any."""

    qkv: Weight
    output: Weight
    up: Weight
    down: Weight
    attention_norm: NormWeights
    feed_forward_norm: NormWeights
    window: int | None = None


class Table:
    """struct tl_block of each block, and struct tl_norm of the norm behind them; keeps the weights alive.

    dtype: of the activations, float32 where all weights are a SharedWeight and bfloat16 where none is.
    Raises ValueError for weights that are not laid out as the kernels read them, or do not fit together.
    """

    def __init__(self, blocks: Sequence[BlockWeights], final_norm: NormWeights | None, form: Form) -> None:
        if not blocks:
            raise ValueError("blocks must have at least one block")
        self.blocks, self.final_norm, self.form = tuple(blocks), final_norm, form
        self.width = blocks[0].qkv.inputs
        self.dtype = torch.float32 if isinstance(blocks[0].qkv, SharedWeight) else torch.bfloat16
        for index, block in enumerate(blocks):
            _check_block(f"blocks[{index}]", block, form, self.width, self.dtype)
        if final_norm is not None:
            _check_norm("final_norm", final_norm, self.width)
        self._shared: list[torch.Tensor] = []  # their addresses are in rows
        self.rows = _bytes(b"".join(map(self._block, blocks)))
        self.final_row = None if final_norm is None else _bytes(_norm(final_norm))

    def __reduce__(self) -> tuple[Any, ...]:
        # addresses are of this process and of these weights: a copy makes its own
        return Table, (self.blocks, self.final_norm, self.form)

    def _block(self, block: BlockWeights) -> bytes:
        linears = b"".join(map(self._linear, (block.qkv, block.output, block.up, block.down)))
        window = struct.pack("q", -1 if block.window is None else block.window)
        return linears + _norm(block.attention_norm) + _norm(block.feed_forward_norm) + window

    def _linear(self, weight: Weight) -> bytes:
        if isinstance(weight, SharedWeight):
            self._shared.append(shared_weight(weight.parts))
            tensors: list[torch.Tensor | None] = [self._shared[-1], None, None, None, weight.bias]
        else:
            tensors = [weight.values, weight.scale, weight.group_scale, weight.smooth, weight.bias]
        sizes = (weight.inputs, weight.outputs, FORMAT_CODES[weight.precision], weight.gated)
        return struct.pack("9q", *map(_native.pointer, tensors), *sizes)


def _check_block(name: str, block: BlockWeights, form: Form, width: int, dtype: torch.dtype) -> None:
    channels = form.heads * form.head_dim
    keys = form.kv_heads * form.head_dim
    sizes = {
        "qkv": (width, block.qkv.outputs, False),
        "output": (channels, width, False),
        "up": (width, block.up.outputs, block.up.gated),
        "down": (block.up.width, width, False),
    }
    for part, (inputs, outputs, gated) in sizes.items():
        weight: Weight = getattr(block, part)
        if isinstance(weight, SharedWeight) != (dtype == torch.float32):
            raise ValueError(f"{name}.{part} is a {type(weight).__name__}, and blocks[0].qkv is not: use one kind")
        if (weight.inputs, weight.outputs, weight.gated) != (inputs, outputs, gated):
            given = f"{weight.outputs} outputs of {weight.inputs} inputs{' in pairs' if weight.gated else ''}"
            raise ValueError(f"{name}.{part} must have {outputs} outputs of {inputs} inputs, not {given}")
        if isinstance(weight, SharedWeight):
            _check_shared(f"{name}.{part}", weight)
        else:
            _check_layout(f"{name}.{part}", weight)
    ends = (channels, form.k_offset), (form.k_offset + keys, form.v_offset), (form.v_offset + keys, block.qkv.outputs)
    if form.heads % form.kv_heads or any(end > limit for end, limit in ends):
        raise ValueError(f"{name}.qkv gives {block.qkv.outputs} numbers, which are not the heads of {form}")
    _check_norm(f"{name}.attention_norm", block.attention_norm, width)
    _check_norm(f"{name}.feed_forward_norm", block.feed_forward_norm, width)


def _check_shared(name: str, weight: SharedWeight) -> None:
    if weight.device.type != "cpu" or not (weight.bias is None or _is_plain(weight.bias)):
        raise ValueError(f"{name} must be on the CPU, not on {weight.device}")


def _check_layout(name: str, weight: FrozenWeight) -> None:
    allowed = tuple(precision for precision in FORMAT_CODES if precision != "fp32")
    if weight.precision not in allowed:
        raise ValueError(
            f"{name} must be stored in one of {allowed}, not {weight.precision!r}; give float32 as a SharedWeight"
        )
    expected = stored_layout(weight.precision, weight.outputs, weight.inputs)
    for part, tensor in weight.tensors.items():
        if (tensor.dtype, tuple(tensor.shape)) != expected.get(part) or not _is_plain(tensor):
            given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name}.{part} must be {expected.get(part)}, contiguous on the CPU, not {given}")


def _check_norm(name: str, norm: NormWeights, width: int) -> None:
    for part in (norm.weight, norm.bias):
        if part is not None and (part.dtype != torch.float32 or part.shape != (width,) or not _is_plain(part)):
            given = f"{part.dtype} {tuple(part.shape)} on {part.device}"
            raise ValueError(f"{name} must be float32 ({width},), contiguous on the CPU, not {given}")


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _norm(norm: NormWeights) -> bytes:
    return struct.pack("2qd", _native.pointer(norm.weight), _native.pointer(norm.bias), norm.eps)
