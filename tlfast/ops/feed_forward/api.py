"""The feed-forward of a side block: two narrow linear layers, an activation between them, and perhaps a gate."""

from __future__ import annotations

import torch

from .. import _dispatch
from .._activations import ACTIVATIONS
from . import reference
from .autograd import FeedForward, kernels
from .weights import Weights

IMPLEMENTATIONS = ("reference", "triton")

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def feed_forward(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    impl: str = "auto",
) -> torch.Tensor:
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where a gate is given; up(x) = x @ up_weight.T + up_bias.

    Args:
        x: (..., R); may be a strided view.
        up_weight, gate_weight: (F, R), with F the hidden channels; gate_weight None: not gated.
        down_weight: (R, F).
        up_bias, gate_bias: (F,) or None; down_bias: (R,) or None.
        activation: "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu".
        impl: "auto", "reference" or "triton" (GPU). A named one runs or raises, it never falls back.

    Returns:
        (..., R) in the dtype of x, which the weights share; under autocast x and the weights are first cast to
        autocast's dtype. "triton" activates and gates in float32 what the first layer gives, and rounds once what the
        second one reads. Gradients reach all that is given, once (no double backward, except with impl="reference").
        Kernels take float32, bfloat16 and float16; float64 runs on the reference alone.

    Cost, for M rows, with n = 2 weights (3 gated): 2 n M R F flops and at least the bytes of x and y (2 M R) and of the
    weights (n R F) forward; 4 n M R F flops, and x, dy, dx (3 M R), the weights and their gradients (2 n R F) backward.
    "triton" keeps x alone and computes hidden channels once more, 2 (n - 1) M R F flops; while it runs, n M F numbers
    exist. The reference keeps 2 M F numbers more (4 M F gated).

    Raises:
        ValueError: shapes, dtypes, devices or activation that do not fit; gate_bias without a gate; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762), section 3.3; gated: Shazeer, "GLU
    Variants Improve Transformer", 2020 (arXiv 2002.05202), equation 6.
    """
    weights = Weights(up_weight, up_bias, down_weight, down_bias, gate_weight, gate_bias)
    _check(x, weights, activation)
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if _under_autocast(x) else x.dtype

    def refuses(name: str) -> str | None:
        if name == "reference":
            return None
        if dtype not in _KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {dtype}; use impl='reference'"
        return _dispatch.interpreter_refuses(dtype)

    chosen = _dispatch.choose("feed_forward", impl, IMPLEMENTATIONS, device_type, refuses)
    if chosen == "reference":
        return reference.feed_forward(x, weights, activation)
    if _dispatch.runs_eagerly(x, *weights):
        return kernels().forward(x.to(dtype), weights, activation)
    return FeedForward.apply(x.to(dtype), activation, *weights)


def _under_autocast(x: torch.Tensor) -> bool:
    return x.dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _check(x: torch.Tensor, w: Weights, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, not {activation!r}")
    for name, required in (("x", x), ("up_weight", w.up_weight), ("down_weight", w.down_weight)):
        if not isinstance(required, torch.Tensor) or not required.is_floating_point():
            given = required.dtype if isinstance(required, torch.Tensor) else type(required).__name__
            raise ValueError(f"{name} must be a floating-point tensor, not {given}")
    if w.up_weight.dim() != 2:
        raise ValueError(f"up_weight must be (F, R), not of shape {tuple(w.up_weight.shape)}")
    hidden, width = w.up_weight.shape
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"x must be (..., {width}) as up_weight is {tuple(w.up_weight.shape)}, not {tuple(x.shape)}")
    if w.gate_bias is not None and w.gate_weight is None:
        raise ValueError("gate_bias is given without gate_weight: pass both, or neither")
    casts = _under_autocast(x)
    shapes = (hidden, width), (hidden,), (width, hidden), (width,), (hidden, width), (hidden,)  # in their order
    for name, tensor, shape in zip(Weights._fields, w, shapes, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a floating-point tensor, not {type(tensor).__name__}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must be {shape} as up_weight is {tuple(w.up_weight.shape)}, not {tuple(tensor.shape)}"
            )
        if tensor.dtype != x.dtype and not casts:
            raise ValueError(
                f"{name} must be {x.dtype} as x is, not {tensor.dtype}: use {name}.to({x.dtype}), or torch.autocast"
            )
