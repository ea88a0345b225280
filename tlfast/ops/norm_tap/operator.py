"""The kernels of sum and norm as a PyTorch operator, opaque to torch.compile."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

torch.library.define(
    "tlfast::norm_tap",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, ScalarType? quantise, str impl)"
    " -> (Tensor total, Tensor y, Tensor values, Tensor scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    # imported on first use: Triton must not be imported before someone asks for it
    return importlib.import_module(f".{impl}", __package__)


@torch.library.impl("tlfast::norm_tap", ("cpu", "cuda"))
def _norm_tap(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    quantise: torch.dtype | None,
    impl: str,
) -> tuple[torch.Tensor, ...]:
    total, y, quantised = kernels(impl).norm_tap(x, residual, weight, bias, eps, rms, quantise)
    # an operator cannot return None, nor its input: what is absent is an empty tensor
    values, scale = (x.new_empty(0), x.new_empty(0)) if quantised is None else quantised
    return x.new_empty(0) if total is None else total, y, values, scale


@torch.library.register_fake("tlfast::norm_tap")
def _norm_tap_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    quantise: torch.dtype | None,
    impl: str,
) -> tuple[torch.Tensor, ...]:
    total = x.new_empty(0 if residual is None else x.shape)
    if quantise is None:
        return total, x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    values, scale = x.new_empty(x.shape, dtype=quantise), x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, x.new_empty(x.shape), values, scale
