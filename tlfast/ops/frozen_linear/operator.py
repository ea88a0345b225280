"""The kernels of frozen linear layers as a PyTorch operator, opaque to torch.compile."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from .weight import FrozenWeight

torch.library.define(
    "tlfast::frozen_linear",
    "(Tensor x, str precision, int outputs, int inputs, Tensor values, Tensor? scale, Tensor? group_scale, "
    "Tensor? smooth, Tensor? bias, bool gated, str activation, ScalarType out_dtype, str impl) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    # imported on first use: Triton must not be imported before someone asks for it
    return importlib.import_module(f".{impl}", __package__)


def operator_arguments(weight: FrozenWeight) -> tuple[Any, ...]:
    """A FrozenWeight as the operator takes it."""
    w = weight
    return (w.precision, w.outputs, w.inputs, w.values, w.scale, w.group_scale, w.smooth, w.bias, w.gated)


@torch.library.impl("tlfast::frozen_linear", ("cpu", "cuda"))
def _frozen_linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *weight, activation, out_dtype, impl = arguments
    return kernels(impl).frozen_linear(x, FrozenWeight(*weight), activation, out_dtype)


@torch.library.register_fake("tlfast::frozen_linear")
def _frozen_linear_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *weight, _activation, out_dtype, _impl = arguments
    return x.new_empty(*x.shape[:-1], FrozenWeight(*weight).width, dtype=out_dtype)
