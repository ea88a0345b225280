"""The product x @ w.T on the CPU by the faster of PyTorch's two routes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .. import _native
from ._shared_weight import linear_fp32
from .frozen_linear.codes import ACTIVATION_CODES

# The library must win by this factor in the probe: machines where the two are close then always take one route, and
# a run gives the same bits every time.
_CLEARLY_FASTER = 1.5
# The library lays w out anew in each call, which pays from so many rows on.
_FEWEST_ROWS = 16


def _native_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T by the library; w of any strides."""
    y = torch.empty((x.shape[0], w.shape[0]), dtype=torch.float32, device="cpu")
    linear_fp32(x if x.stride(1) == 1 else x.contiguous(), [w], None, y, w.shape[0], ACTIVATION_CODES["none"])
    return y


def times_faster(product: Callable[[], object], than: Callable[[], object], rounds: int = 15) -> float:
    """Time of `than` over time of `product`, the best of interleaved rounds.

    On one thread: there a busy machine does not decide the race, while a barrier of several threads waits for the last.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = {product: float("inf"), than: float("inf")}
    try:
        for _ in range(rounds):
            for function in best:
                start = time.perf_counter()
                function()
                best[function] = min(best[function], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[than] / best[product]


@functools.cache
def prefers_native() -> bool:
    """Whether the library's product clearly beats F.linear (MKL) in float32: on AMD with AVX-512, by 2; not on Intel.

    Probed once a process. oneDNN's is as fast there, but adds up a row's terms one after the other, with twice MKL's
    rounding error, and falls to a plain loop, 1000 times slower, for a strided w.
    """
    if not _native.matrix_isa().startswith("AVX-512"):
        return False
    x, w = torch.ones(512, 768), torch.ones(96, 768)
    return times_faster(lambda: _native_product(x, w), than=lambda: F.linear(x, w)) > _CLEARLY_FASTER


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T for CPU matrices x (M, K) and w (N, K) of one dtype; no graph is built.

    F.linear goes to oneDNN in half precision; in float32 it goes to MKL, which is slow on AMD.
    """
    with torch.no_grad():
        if x.dtype == torch.float32 and x.shape[0] >= _FEWEST_ROWS and w.numel() and prefers_native():
            return _native_product(x, w)
        return F.linear(x, w)
