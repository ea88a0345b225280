"""The product x @ w.T on the CPU by the faster of PyTorch's two routes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

# oneDNN must win by this factor in the probe: machines where the two are close then always take the same route, and a
# run gives the same bits every time.
_CLEARLY_FASTER = 1.5


def _onednn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


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
def prefers_onednn(transposed: bool) -> bool:
    """Whether oneDNN clearly beats F.linear (MKL) in float32 here: it does on AMD, by more than 2, not on Intel.

    Probed once a process, for x row-major (the forward product) and for x and w transposed views (a weight gradient).
    The operator is private to PyTorch, so its absence or refusal counts as "no".
    """
    x, w = torch.ones(512, 768), torch.ones(96, 768)
    if transposed:
        x, w = torch.ones(512, 96).t(), torch.ones(512, 768).t()
    try:
        expected = F.linear(x, w)
        if not torch.equal(_onednn(x, w), expected):
            return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return times_faster(lambda: _onednn(x, w), than=lambda: F.linear(x, w)) > _CLEARLY_FASTER


def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T for CPU matrices x (M, K) and w (N, K) of one dtype; no graph is built.

    F.linear already goes to oneDNN in half precision; in float32 it goes to MKL, which is slow on AMD.
    """
    with torch.no_grad():
        if x.dtype == torch.float32 and x.numel() and w.numel() and prefers_onednn(not x.is_contiguous()):
            return _onednn(x, w)
        return F.linear(x, w)
