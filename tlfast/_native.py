"""Loads the native library once and keeps the reason where it cannot."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

_FIX = "reinstall tlfast with a C++ compiler at hand (pip install -e . -v shows the build)"


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("TLFAST_DISABLE_NATIVE", "") not in ("", "0"):
        return None, "blocked by TLFAST_DISABLE_NATIVE"
    try:
        return importlib.import_module("tlfast._C"), None
    except ImportError as error:
        return None, f"native library not loaded ({error}); {_FIX}"


def why_not() -> str | None:
    """None where the native library is loaded, otherwise the reason."""
    return _load()[1]


def library() -> ModuleType:
    """The native library (csrc/bind.cpp).

    Raises:
        RuntimeError: with the reason, where it cannot be loaded.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def build_info() -> dict[str, str]:
    """What the library was built with and uses here: "cpu_isa", "matrix_isa" (of kernels in bfloat16 and
    int8), "cuda_architectures" ("" without CUDA), "thread_pool".

    Raises:
        RuntimeError: with the reason, where the library cannot be loaded.
    """
    native = library()
    return {name: getattr(native, name)() for name in ("cpu_isa", "matrix_isa", "cuda_architectures", "thread_pool")}


@functools.cache
def matrix_isa() -> str:
    """What the CPU kernels multiply matrices in bfloat16 and int8 with; "none" where the library cannot be loaded."""
    return "none" if why_not() else library().matrix_isa()


def dtype_code(dtype: torch.dtype) -> int:
    """The library's code of a dtype it computes with: float32, float16, bfloat16."""
    native = library()
    return {torch.float32: native.F32, torch.float16: native.F16, torch.bfloat16: native.BF16}[dtype]


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element, 0 for None: what the library takes for an absent argument."""
    return 0 if tensor is None else tensor.data_ptr()
