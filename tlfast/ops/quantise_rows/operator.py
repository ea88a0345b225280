"""The kernels of quantised rows as a PyTorch operator, opaque to torch.compile."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

torch.library.define(
    "tlfast::quantise_rows",
    "(Tensor x, Tensor? smooth, ScalarType dtype, str impl) -> (Tensor values, Tensor scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@functools.cache
def kernels(impl: str) -> ModuleType:
    # imported on first use: Triton must not be imported before someone asks for it
    return importlib.import_module(f".{impl}", __package__)


@torch.library.impl("tlfast::quantise_rows", ("cpu", "cuda"))
def _quantise_rows(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: torch.dtype, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels(impl).quantise_rows(x, smooth, dtype)


@torch.library.register_fake("tlfast::quantise_rows")
def _quantise_rows_fake(
    x: torch.Tensor, smooth: torch.Tensor | None, dtype: torch.dtype, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)
