"""How a tap is kept until the backward pass, where the gradient of its projection reads it, and nothing else does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from ..ops import quantise_rows
from .rung import Entrance, Rung


class Keep:
    """As the backbone gives it; or, where rungs project it first, projected.

    A storage is made for one forward of a side network, which takes the embedding and each tap to the rungs through it.
    """

    def enter(self, entrance: Entrance, embedding: torch.Tensor) -> torch.Tensor:
        """The first side state."""
        return entrance(embedding)

    def climb(self, rung: Rung, tap: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """What a rung gives."""
        return rung(tap, s)


class _Packed(Keep, ABC):
    """Keeps something else in the place of a tap, and makes a tap of it again in the backward pass."""

    @abstractmethod
    def pack(self, tap: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What gives the tap once more; called once the forward product is on its way."""

    def enter(self, entrance: Entrance, embedding: torch.Tensor) -> torch.Tensor:
        embedding = as_autocast(embedding)
        with self._in_place_of(embedding):
            return entrance(embedding)

    def climb(self, rung: Rung, tap: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        tap = as_autocast(tap)
        with self._in_place_of(tap):
            return rung(tap, s)

    def _in_place_of(self, tap: torch.Tensor) -> Any:
        """Hooks that let everything pass but this tap, of which autograd may save any view of all its numbers."""
        place, size = tap.data_ptr(), tap.numel()  # PyTorch keeps the hooks, which must not keep the tap

        def pack(saved: torch.Tensor) -> Any:
            is_tap = saved.data_ptr() == place and saved.numel() == size > 0
            return self.pack(saved) if is_tap else saved

        def unpack(kept: Any) -> torch.Tensor:
            return kept if isinstance(kept, torch.Tensor) else kept()

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Int8(_Packed):
    """In 8 bits with a scale a token: of all gradients only those of the projections become inexact."""

    def pack(self, tap: torch.Tensor) -> Callable[[], torch.Tensor]:
        dtype = tap.dtype
        with torch.no_grad():
            values, scale = quantise_rows(tap.detach())
        return lambda: values.to(dtype) * scale[..., None].to(dtype)


class Offload(_Packed):
    """In pinned memory of the host. Copies run on a stream of their own, back one tap ahead of the backward pass."""

    def __init__(self) -> None:
        self.out: list[_OnHost] = []

    def pack(self, tap: torch.Tensor) -> Callable[[], torch.Tensor]:
        if tap.device.type != "cuda":
            raise ValueError(
                f"tap_storage: 'offload' brings taps from a GPU to the host's memory, and these are on the "
                f"{tap.device.type} already; use 'int8' or 'stream', or move the model to a GPU"
            )
        self.out.append(_OnHost(tap.detach()))
        return self.out[-1].taken_from(self.out)


class _OnHost:  # pragma: gpu
    """A tap on its way to the host, there, or on its way back."""

    def __init__(self, tap: torch.Tensor) -> None:
        self.device = tap.device
        self.host = torch.empty(tap.shape, dtype=tap.dtype, pin_memory=True)
        self.back: torch.Tensor | None = None
        self.stream = _copy_stream(tap.device)
        self.stream.wait_stream(torch.cuda.current_stream(tap.device))
        with torch.cuda.stream(self.stream):
            self.host.copy_(tap, non_blocking=True)
        tap.record_stream(self.stream)

    def fetch(self) -> None:
        """Begin the way back."""
        if self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)

    def taken_from(self, out: list[_OnHost]) -> Callable[[], torch.Tensor]:
        """What gives the tap, and begins to fetch the one that the backward pass needs next."""
        place = len(out) - 1

        def take() -> torch.Tensor:
            self.fetch()
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            tap, self.back = self.back, None
            assert tap is not None
            tap.record_stream(current)
            if place:
                out[place - 1].fetch()
            return tap

        return take


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:  # pragma: gpu
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def as_autocast(tap: torch.Tensor) -> torch.Tensor:
    """The tap as the product under autocast reads it, so that this is what is kept."""
    kind = tap.device.type
    if tap.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tap
    return tap.to(torch.get_autocast_dtype(kind))
