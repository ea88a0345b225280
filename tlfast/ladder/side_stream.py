"""On a GPU a side network climbs on a stream of its own, while the backbone computes its next block on another."""

from __future__ import annotations

import torch

from .side_network import Climb

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


class Beside:
    """A climb, called and ended as it is; on other devices than GPUs nothing but that.

    Autograd runs the backward pass of what it computes on its stream too, and lets each stream wait for the other.
    """

    def __init__(self, climb: Climb) -> None:
        self.climb = climb

    def __call__(self, tap: torch.Tensor) -> None:
        """Begins when the tap is there."""
        if not tap.is_cuda:
            return self.climb(tap)
        return self._on_its_stream(tap)

    def end(self) -> torch.Tensor:
        """What the climb gives; the current stream waits for it."""
        state = self.climb.s
        if state is not None and state.is_cuda:
            _wait_for(state)
        return self.climb.end()

    def _on_its_stream(self, tap: torch.Tensor) -> None:  # pragma: gpu
        stream = _stream(tap.device)
        stream.wait_stream(torch.cuda.current_stream(tap.device))
        with torch.cuda.stream(stream):
            self.climb(tap)
        # the backbone drops a tap before the work on it is done: its memory must not be given to the next one
        tap.record_stream(stream)


def _wait_for(state: torch.Tensor) -> None:  # pragma: gpu
    current = torch.cuda.current_stream(state.device)
    current.wait_stream(_stream(state.device))
    state.record_stream(current)


def _stream(device: torch.device) -> torch.cuda.Stream:  # pragma: gpu
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
