"""What a training step holds, found by running it on tensors that have shapes and no memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_YOUNG = 1  # generations in which a forward's cycles are found; all of Python's objects would take half a second


class Traced(NamedTuple):
    """Bytes beyond what was there before: net after the forward, its result included, and the most at any moment.

    peak: of forward and backward, gradients included.
    """

    saved: int
    peak: int


class _Watch(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they live."""

    def __init__(self, existing: list[torch.Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in existing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, result)
        return result

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, size)
        return tensor

    def _free(self, size: int) -> None:
        self.current -= size


Forward = Callable[[], tuple[torch.Tensor, Any]]  # the loss, and whatever else a caller holds of the result


def trace(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], forward: Forward) -> Traced:
    """Trace `forward()` and its backward. All tensors are those of one FakeTensorMode, which is entered.

    Temporary memory inside one operation of PyTorch is not seen. Kernels are chosen as for the CPU, whose fused
    attention keeps no map of scores unless dropout is in it.
    """
    with _Watch([*model.parameters(), *model.buffers(), *inputs.values()]) as watch:
        result = forward()
        gc.collect(_YOUNG)
        saved = watch.current
        result[0].backward()
        del result
    for parameter in model.parameters():
        parameter.grad = None
    return Traced(saved, watch.peak)


def trace_saved(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], forward: Forward) -> int:
    """What `trace` says is saved, without tracing the backward."""
    with _Watch([*model.parameters(), *model.buffers(), *inputs.values()]) as watch:
        result = forward()
        gc.collect(_YOUNG)
        saved = watch.current
        del result
    return saved
