"""How an operation picks among its implementations; the same for every operation.

What this machine lacks is found once, at import, into a plain dictionary: torch.compile then traces through the choice.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from .. import _native

# What "auto" tries, in this order, for inputs on a device of that type; on any other device only plain PyTorch runs:
# "recompute", the leaner one for the backward pass, and "buckets", PyTorch's own kernels, before "reference".
_PLAIN = ("recompute", "buckets", "reference")
ORDER = {"cpu": ("native", *_PLAIN), "cuda": ("triton", "cuda", "sdpa", "varlen", *_PLAIN)}
_OF_CUDA = ("triton", "cuda", "sdpa", "varlen")

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)  # no subclass, which a mode or a tracer would have to see

# Triton's own switch, which it reads when a kernel is defined: kernels then run on CPU tensors, slowly, in Python.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _find_missing() -> dict[str, str]:
    missing = {}
    reason = _native.why_not()
    if reason is not None:
        missing = {"native": reason, "cuda": reason}
    elif not _native.library().cuda_architectures():
        missing["cuda"] = "native library built without CUDA; reinstall tlfast with nvcc on PATH"
    if importlib.util.find_spec("triton") is None:
        missing["triton"] = "triton is not installed; pip install triton"
    return missing


MISSING = _find_missing()


def _wrong_device(impl: str, device_type: str) -> str | None:
    runs_on = "cuda" if impl in _OF_CUDA else {"native": "cpu"}.get(impl, device_type)
    if device_type == runs_on or (impl == "triton" and TRITON_INTERPRETED and device_type == "cpu"):
        return None
    return f"it needs {runs_on} tensors and was given {device_type} ones; move the inputs or use impl='auto'"


def choose(
    op: str, impl: str, implementations: tuple[str, ...], device_type: str, refuses: Callable[[str], str | None]
) -> str:
    """The implementation to run: the named one, or the first in `ORDER` that can where `impl` is "auto".

    `refuses(name)` says why an implementation cannot take these inputs, None where it can.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named implementation cannot run here or on these inputs, with the reason; it never falls back.
    """
    if impl == "auto":
        for name in ORDER.get(device_type, _PLAIN):
            if name in implementations and name not in MISSING and refuses(name) is None:
                return name
        return "reference"
    if impl not in implementations:
        raise ValueError(f"impl={impl!r} is not one of {op}'s implementations: use 'auto' or one of {implementations}")
    reason = MISSING.get(impl) or _wrong_device(impl, device_type) or refuses(impl)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
    return impl


def interpreter_refuses(*dtypes: torch.dtype) -> str | None:
    """Why Triton cannot compute in one of these dtypes here, None where it can: its interpreter has no bfloat16."""
    if TRITON_INTERPRETED and torch.bfloat16 in dtypes:
        return "Triton's interpreter computes bfloat16 wrongly; unset TRITON_INTERPRET or use float32"
    return None


def runs_eagerly(*tensors: torch.Tensor | None) -> bool:
    """Whether a kernel may be called as it is: no graph is built and nothing traces the call.

    Going through autograd.Function and torch.library costs about 40 microseconds a call, which is most of the time of
    an operation on one token.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return all(tensor is None or type(tensor) in _PLAIN_TENSORS for tensor in tensors)


def availability(implementations: tuple[str, ...]) -> dict[str, str]:
    """For each implementation "available", or the reason why this machine cannot run it."""
    found = {}
    for name in implementations:
        reason = MISSING.get(name)
        if reason is None and name in _OF_CUDA and not torch.cuda.is_available():
            interpreted = name == "triton" and TRITON_INTERPRETED
            reason = "available (TRITON_INTERPRET=1: on the CPU, slow)" if interpreted else "no CUDA device"
        found[name] = reason or "available"
    return found


def automatic(implementations: tuple[str, ...]) -> tuple[str, str]:
    """What "auto" takes on this machine's fastest device, and why, in one line."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    passed_over: list[str] = []
    for name in ORDER[device_type]:
        if name not in implementations:
            continue
        if name not in MISSING:
            return name, f"first choice for {device_type} tensors" if not passed_over else "; ".join(passed_over)
        passed_over.append(f"no {name}: {MISSING[name]}")
    raise AssertionError("every operation has a reference implementation")
