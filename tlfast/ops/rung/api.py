"""The rung of a ladder: a gated blend of a frozen backbone's hidden state into the side state."""

from __future__ import annotations

import math

import torch

from .. import _dispatch
from . import reference
from .autograd import Rung, kernels

IMPLEMENTATIONS = ("reference", "native", "triton", "cuda")

_TRITON_WIDTH = 512
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rung(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float = 0.1,
    impl: str = "auto",
) -> torch.Tensor:
    """Blend a tap into the side state: mu * s + (1 - mu) * (h @ weight.T + bias), mu = sigmoid(alpha / temperature).

    Args:
        h: tap (..., D), the frozen backbone's hidden state; may be a strided view. It gets no gradient.
        s: side state (..., R), with the leading dimensions of h.
        weight: projection (R, D).
        bias: (R,) or None.
        alpha: gate, () or (1,) for one gate, (R,) for one per channel; dimensionless.
        temperature: of the gate, positive; dimensionless.
        impl: "auto", "reference", "native", "triton" or "cuda". A named one runs or raises, it never falls back. "auto"
            takes "cuda" before "triton" for taps in float32, whose products cuBLAS computes faster.

    Returns:
        (..., R) in the dtype of s. Under autocast h is first cast to autocast's dtype. The product's operands have the
        dtype of h and accumulate in float32, as under autocast; the blend is computed in float32. Gradients reach s,
        weight, bias and alpha, once (no double backward, except with impl="reference"). Kernels take float32, bfloat16
        and float16; float64 runs on the reference alone.

    Cost, for M rows: 2 M D R flops and at least the bytes of h (M D), s and z (2 M R) forward; backward 2 M D R flops
    and the bytes of h, dz, s, z and ds. The kept tensors (h, s, z) exist anyway: a rung saves nothing of its own.

    Raises:
        ValueError: shapes, dtypes, devices or temperature that do not fit; h requires a gradient; unknown impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: Sung, Cho, Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS
    2022 (arXiv 2206.06522), section 3.2: the gate mu_i = sigmoid(alpha_i / T) between side state and down-projection.
    """
    _check(h, s, weight, bias, alpha, temperature)
    device_type = h.device.type
    if h.dtype != torch.float64 and not h.is_meta and torch.is_autocast_enabled(device_type):
        h = h.to(torch.get_autocast_dtype(device_type))
    tensors = (h, s, weight, alpha) if bias is None else (h, s, weight, bias, alpha)

    def refuses(name: str) -> str | None:
        if name == "reference":
            return None
        for tensor in tensors:
            if tensor.dtype not in _KERNEL_DTYPES:
                return f"it takes float32, bfloat16 and float16, not {tensor.dtype}; use impl='reference'"
        if name == "triton":
            if impl == "auto" and h.dtype == torch.float32 and "cuda" not in _dispatch.MISSING:
                return "cuBLAS multiplies float32 faster"
            if weight.shape[0] > _TRITON_WIDTH:
                return f"a program holds the whole side width, at most {_TRITON_WIDTH}, not {len(weight)}; use 'cuda'"
            return _dispatch.interpreter_refuses(*(tensor.dtype for tensor in tensors))
        return None

    chosen = _dispatch.choose("rung", impl, IMPLEMENTATIONS, device_type, refuses)
    if chosen == "reference":
        return reference.rung(h, s, weight, bias, alpha, temperature)
    if _dispatch.runs_eagerly(*tensors):
        return kernels(chosen).forward(h, s, weight, bias, alpha, float(temperature))
    return Rung.apply(h, s, weight, bias, alpha, float(temperature), chosen)


def _check(
    h: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: torch.Tensor,
    temperature: float,
) -> None:
    for name, tensor in (("h", h), ("s", s), ("weight", weight), ("bias", bias), ("alpha", alpha)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be a floating-point tensor, not {given}")
        if tensor.device != h.device:
            raise ValueError(f"{name} is on {tensor.device} and h on {h.device}: move them to one device")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (R, D), not of shape {tuple(weight.shape)}")
    width_side, width = weight.shape
    if h.dim() < 1 or h.shape[-1] != width:
        raise ValueError(f"h must be (..., {width}) as weight is {tuple(weight.shape)}, not {tuple(h.shape)}")
    if s.shape != (*h.shape[:-1], width_side):
        raise ValueError(f"s must be {(*h.shape[:-1], width_side)} to fit h and weight, not {tuple(s.shape)}")
    if bias is not None and bias.shape != (width_side,):
        raise ValueError(f"bias must be ({width_side},) as weight is {tuple(weight.shape)}, not {tuple(bias.shape)}")
    if alpha.shape not in ((), (1,), (width_side,)):
        raise ValueError(
            f"alpha must be () or (1,) for one gate or ({width_side},) for one per channel, not {tuple(alpha.shape)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    if h.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "h requires a gradient, but a rung has none for it: the backbone is frozen. Pass h.detach(), or compute the"
            " tap under torch.no_grad()"
        )
