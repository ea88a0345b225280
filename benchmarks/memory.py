"""The most memory a step holds at any moment, beyond what was there before it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The highest sum of what `fn()` has allocated and not yet freed, of PyTorch's memory on the host.

    Memory that was there before does not count, and freeing it does not lower the sum; weights are not in it, gradients
    and optimizer states are where the step makes them.
    """
    # Kineto reads this at its first profile; otherwise it writes two lines to standard error for each.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        fn()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    moves = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for move in sorted(moves, key=lambda event: event.start_ns()):
        held += move.nbytes()
        peak = max(peak, held)
    return peak
