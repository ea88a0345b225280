"""Measure what a step costs: bytes kept for the backward pass, time against peers, peak memory, and where it ran."""

from __future__ import annotations

import gc
import operator
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .. import _native

PACKAGES = ("tlfast", "torch", "triton", "transformers", "numpy")


def saved_bytes(fn: Callable[[], Any]) -> int:
    """Net bytes that `fn()` allocates and that are still alive after it, while its result is kept.

    For a training forward: what autograd keeps for the backward pass, and the result itself. Counts PyTorch's
    allocations, host and CUDA, and takes garbage in reference cycles as freed; memory that a C++ library takes for
    itself is not seen. Freeing older memory does not count on the host, where it is not traced; on CUDA it does.
    Call `fn` once before where its first call fills caches.
    """
    # Kineto reads this at its first profile; otherwise it writes two lines to standard error for each.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gc.collect()
    before = _cuda_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = fn()
        gc.collect()
    on_cuda = _cuda_bytes() - before
    del result
    return sum(host_moves(trace)) + on_cuda


def host_moves(trace: profile) -> list[int]:
    """Bytes that a finished profile saw PyTorch take (positive) and give back (negative) on the host, in order.

    What was there before the profile does not count when it is given back, even where an earlier profile had seen it
    taken: PyTorch remembers sizes by address from one profile to the next.
    """
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    waiting = list(trace.profiler.kineto_results.experimental_event_tree())
    found = []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        fields: Any = event.extra_fields
        if event.tag.name == "Allocation" and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    moves, held = [], set()
    for _, address, size in sorted(found, key=operator.itemgetter(0)):
        if size > 0:
            held.add(address)
        elif address not in held:
            continue
        else:
            held.remove(address)
        moves.append(size)
    return moves


def hook_bytes(fn: Callable[[], Any]) -> int:
    """Bytes of the storages that `fn()` saves for backward and that did not exist before; each counts once, whole.

    Unlike `saved_bytes` this leaves out the result and what is kept outside autograd's graph, such as attributes of a
    module, and counts a storage whole where only a view of it is saved.
    """
    existing = _live_storages()  # held until the end, so that none of their addresses is given out again
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in existing:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn()
    return sum(storage.nbytes() for storage in kept.values())


def timed_rounds(
    functions: Mapping[str, Callable[[], Any]], rounds: int = 7, setup: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds; a round runs all of them, starting one further each time.

    Interleaving lets a change of the machine's speed strike all alike: compare `medians`, or ratios round by round.
    Each runs once before, unmeasured; setup runs before every call, unmeasured. CUDA work is waited for.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}; pass an integer of at least 1")
    names = list(functions)
    for name in names:
        setup()
        functions[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            setup()
            _wait()
            start = time.perf_counter()
            functions[name]()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each function's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_rss() -> int:
    """The most resident memory this process has had so far, in bytes.

    From Linux's /proc where it is there: getrusage hands a process the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def environment() -> dict[str, Any]:
    """Where a figure was measured: "versions" (None: not installed) and "machine", as plain JSON types."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "native_isa": None if _native.why_not() else _native.build_info()["cpu_isa"],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cuda": torch.version.cuda,
        },
    }


def version(package: str) -> str | None:
    """The installed version of a package, read without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_bytes() -> int:
    return sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _live_storages() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors that Python can reach, by address."""
    storages = {}
    for thing in gc.get_objects():
        # type() rather than isinstance(), which would run properties of lazy objects; subclasses may hold no storage
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            with suppress(RuntimeError):  # a tensor that a trace made has no memory
                storages[storage.data_ptr()] = storage
    return storages
