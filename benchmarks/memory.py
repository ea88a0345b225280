"""The most memory a step holds at any moment, beyond what was there before it."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tlfast.bench.measure import host_moves


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
    return max(itertools.accumulate(host_moves(trace)), default=0)
