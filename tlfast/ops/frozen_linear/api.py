"""A linear layer whose weight never changes: stored in fewer bits, laid out once, dequantised on the way."""

from __future__ import annotations

import torch

from ... import _native
from .. import _dispatch
from .._gpu import capability
from .._shared_weight import why_not_native
from . import reference
from .layout import PANELS, ROWS
from .operator import kernels, operator_arguments
from .weight import FrozenWeight

IMPLEMENTATIONS = ("reference", "native", "triton")
ACTIVATIONS = tuple(reference.ACTIVATE)

_DTYPES = (torch.float32, torch.bfloat16)


def frozen_linear(
    x: torch.Tensor,
    weight: FrozenWeight,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """activation(x W^T + b), with W and b stored in a FrozenWeight; activation(x G^T) * (x U^T) where it is gated.

    Args:
        x: (..., K) in float32 or bfloat16; strided views allowed. No gradient.
        weight: of N outputs and K inputs. What the product sees:
            "fp32": x and W in float32.
            "bf16", "nf4": both rounded to bfloat16, sums in float32.
            "int8_weight_only": x rounded to bfloat16, W as it is stored, sums in float32.
            "int8": W's rows with a scale each and x's rows with a scale each, sums exact in int32.
            "fp8": the same in float8_e4m3fn, sums in float32.
        activation: one of `ACTIVATIONS`.
        out_dtype: float32 or bfloat16; None: that of x.
        impl: "auto", "reference", "native" (C++, CPU; not "fp8", and "fp32" on AVX-512 and AMX alone) or "triton" (GPU
            from compute capability 8.0 on; not "fp32", and "fp8" from 9.0 on; "bf16" through cuBLAS, which rounds its
            sums to bfloat16 before the activation). A named one runs or raises, it never falls back.

    Returns:
        (..., N) in out_dtype; (..., N/2) of a gated weight.

    Cost, for M rows: 2 M N K flops (in float32 on AMX six times that in bfloat16). x in and y out once; W once: 4, 2, 1
    or 0.52 bytes a number. "triton" with "int8" and "fp8" writes x once more in 8 bits and reads it, with "bf16" and an
    activation y.

    "triton" is compiled ahead of time for compute capabilities 8.0, 9.0 and 10.0 and checked under Triton's
    interpreter; its tests on a GPU have passed on an H200 (9.0).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; x requires a gradient; unknown activation or impl.
        RuntimeError: the named implementation cannot run here or on these inputs.

    Source: int8: Dettmers et al., "LLM.int8()", NeurIPS 2022 (arXiv 2208.07339), section 3.1, and Xiao et al.,
    "SmoothQuant", ICML 2023 (arXiv 2211.10438); nf4: Dettmers et al., "QLoRA", NeurIPS 2023 (arXiv 2305.14314), section
    3; float32 from bfloat16: Henry, Tang, Heinecke, "Leveraging the bfloat16 AI datatype", 2019 (arXiv 1904.06376).
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, weight, activation, out_dtype)

    def refuses(name: str) -> str | None:
        if name == "reference":
            return None
        reason = _layout_refuses(weight, PANELS if name == "native" else ROWS)
        if name == "native":
            return _native_refuses(weight.precision, x.dtype, out_dtype) or reason
        return _triton_refuses(weight.precision, x.device, (x.dtype, out_dtype)) or reason

    chosen = _dispatch.choose("frozen_linear", impl, IMPLEMENTATIONS, x.device.type, refuses)
    if chosen == "reference":
        return reference.frozen_linear(x, weight, activation, out_dtype)
    if _dispatch.runs_eagerly(x):
        return kernels(chosen).frozen_linear(x, weight, activation, out_dtype)
    return torch.ops.tlfast.frozen_linear.default(x, *operator_arguments(weight), activation, out_dtype, chosen)


def automatic(precision: str) -> tuple[str, str]:
    """What impl="auto" takes on this machine's fastest device for float32 inputs, and why, in one line."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        reason = _dispatch.MISSING.get("triton") or _triton_refuses(precision, device, _DTYPES)
        chosen = "triton", "cuBLAS, and Triton behind it" if precision == "bf16" else "first choice for cuda tensors"
    else:
        reason = _dispatch.MISSING.get("native") or _native_refuses(precision, torch.float32, torch.float32)
        chosen = "native", f"its kernels use {_native.matrix_isa()}"
    return chosen if reason is None else ("reference", reason)


def why_not_fp8(device: torch.device) -> str | None:
    """None where a kernel multiplies in "fp8" on a device, otherwise the reason."""
    if device.type != "cuda":
        return f"precision 'fp8' needs a CUDA GPU of compute capability 9.0 or newer, and the weights are on {device}"
    return _dispatch.MISSING.get("triton") or _triton_refuses("fp8", device, _DTYPES)


def _native_refuses(precision: str, dtype: torch.dtype, out_dtype: torch.dtype) -> str | None:
    if precision == "fp8":
        return "precision 'fp8' has no kernel on the CPU; use impl='reference'"
    if precision != "fp32":
        return None
    reason = why_not_native()
    if reason is not None:
        return f"{reason}; use impl='reference'"
    if dtype != torch.float32 or out_dtype != torch.float32:
        return f"precision 'fp32' takes and gives float32, not {dtype} and {out_dtype}; use impl='reference'"
    return None


def _triton_refuses(precision: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if precision == "fp32":
        return "products in float32 are PyTorch's own; use impl='reference'"
    if device.type == "cpu":
        return _dispatch.interpreter_refuses(*dtypes)
    needed = 90 if precision == "fp8" else 80
    if capability(device) < needed:
        has = f"{device} has {capability(device) / 10}"
        return f"precision {precision!r} needs a GPU of compute capability {needed / 10} or newer, and {has}"
    return None


def _layout_refuses(weight: FrozenWeight, layout: str) -> str | None:
    if weight.precision == "fp32" or weight.layout == layout:
        return None
    return (
        f"it reads weights in {layout}, and this one lies in {weight.layout}: use weight.in_layout({layout!r}), or move"
        " the FrozenLinear that holds it, which lays it out for its device"
    )


def _check(x: torch.Tensor, weight: FrozenWeight, activation: str, out_dtype: torch.dtype) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
        given = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor in one of {_DTYPES}, not {given}")
    if not isinstance(weight, FrozenWeight):
        raise ValueError(
            f"weight must be a FrozenWeight, not {type(weight).__name__}: use FrozenWeight.of(weight, bias)"
        )
    if x.dim() == 0 or x.shape[-1] != weight.inputs:
        raise ValueError(f"x must be (..., {weight.inputs}) as the weight's inputs are, not {tuple(x.shape)}")
    if x.device != weight.values.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.values.device}: move them to one device")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x requires a gradient, but frozen_linear has none: call it under torch.no_grad()")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
    if out_dtype not in _DTYPES:
        raise ValueError(f"out_dtype must be one of {_DTYPES}, not {out_dtype}")
