"""Which side blocks run as one operation, and how its arguments are taken from their modules."""

from __future__ import annotations

from typing import Any

import torch

from ..backbone.parts import BlockSpec
from ..ops._dispatch import MISSING
from ..ops.side_block import PLACEMENTS, BlockSettings, BlockWeights, side_block

# Of those that transformers calls otherwise.
_ACTIVATION_NAMES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}

# Fewer and longer sequences than these are better shared out by heads and rows, as the modules' operations do.
_FEW_SEQUENCES, _LONG = 4, 512


def why_not(block: Any, x: torch.Tensor, arguments: dict[str, Any]) -> str | None:
    """None where block(x, key_mask, **arguments) runs as `tlfast.ops.side_block`, otherwise the reason."""
    spec = block.spec
    if "native" in MISSING:
        return MISSING["native"]
    autocast = torch.is_autocast_enabled("cpu")
    if autocast and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return f"under autocast products are in {torch.get_autocast_dtype('cpu')}, not bfloat16"
    if not (x.dtype == torch.float32 or (autocast and x.dtype == torch.bfloat16)) or x.device.type != "cpu":
        return f"x is {x.dtype} on {x.device.type}, not float32 on the CPU"
    if block.feed_forward.up.weight.dtype != torch.float32:
        return f"the weights are {block.feed_forward.up.weight.dtype}, not float32"
    for name, value in arguments.items():
        if value is not None:
            return f"it is given a {name}"
    if x.shape[0] < _FEW_SEQUENCES and x.shape[1] > _LONG:
        return f"{x.shape[0]} sequences of {x.shape[1]} tokens keep few threads busy, which take one sequence each"
    return why_not_of_its_form(spec)


def why_not_of_its_form(spec: BlockSpec) -> str | None:
    """None where a block of this form can run as one operation, in float32 on a CPU; otherwise the reason."""
    if spec.cross:
        return "it attends to an encoder"
    if spec.positions in ("relative", "rotary"):
        return f"its positions are {spec.positions}"
    if spec.kv_heads != spec.heads:
        return "query heads share keys and values"
    if spec.qk_norm:
        return "queries and keys are normed"
    if spec.gated:
        return "its feed-forward is gated"
    if spec.placement not in PLACEMENTS:
        return f"its norms stand as in a {spec.placement}"
    return None


def run(block: Any, x: torch.Tensor, key_mask: torch.Tensor | None, seeds: torch.Tensor | None) -> torch.Tensor:
    """block(x, key_mask) as one operation, under autocast in bfloat16; seeds (3,), None outside training."""
    spec, rounded = block.spec, torch.is_autocast_enabled("cpu")
    settings = BlockSettings(
        spec.heads,
        spec.placement,
        spec.norm,
        operation_name(spec.activation),
        spec.causal,
        spec.eps,
        spec.head_dim**-0.5 if spec.scale is None else spec.scale,
        0.0 if seeds is None else spec.attention_dropout,
        0.0 if seeds is None else spec.hidden_dropout,
        "bf16" if rounded else "fp32",
    )
    return side_block(x.float() if rounded else x, weights_of(block), settings, key_mask=key_mask, seeds=seeds)


def weights_of(block: Any) -> BlockWeights:
    """The block's weights in the operation's order."""
    attention, mlp = block.attention, block.feed_forward
    layers = (block.attention_norm, attention.qkv, attention.output, block.feed_forward_norm, mlp.up, mlp.down)
    return BlockWeights(*(parameter for layer in layers for parameter in parameters_of(layer)))


def operation_name(activation: str) -> str:
    """What operations call an activation of transformers."""
    return _ACTIVATION_NAMES.get(activation, activation)


def parameters_of(module: Any) -> tuple[Any, Any]:
    """Weight and bias, None where there is none."""
    if module is None:
        return None, None
    parameters = module._parameters
    return parameters["weight"], parameters.get("bias")
