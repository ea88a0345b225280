"""The contrastive loss beside plain PyTorch's with its B x B matrix, and beside a checkpointed one in chunks, float32.

Forward + backward, interleaved in one process on the same inputs, agreement checked first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import peak_bytes
from tlfast.bench.measure import hook_bytes, medians, timed_rounds
from tlfast.contrastive import clip_loss

ROUNDS = 5
WIDTH, SCALE = 256, 20.0
CHUNK = 512  # rows; the fastest of 64, 128, 256, 512, 1024 and 2048 at 4,096 and 8,192 pairs


def make(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(rows, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_()


def plain(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """As open_clip writes it, but for the second product: its logits for texts are the first's, transposed."""
    logits = SCALE * image @ text.T
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def chunked(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Some rows of the matrix at a time, thrown away and made anew in the backward pass."""

    def reduce(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = SCALE * rows @ text.T
        return logits.logsumexp(1).sum(), logits.logsumexp(0)

    parts = [checkpoint(reduce, rows, use_reentrant=False) for rows in image.split(CHUNK)]
    columns = torch.stack([part[1] for part in parts]).logsumexp(0).sum()
    own = SCALE * (image * text).sum()
    return ((sum(part[0] for part in parts) + columns) / 2 - own) / len(image)


def gradients(loss: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("rows", [2048, 8192])
def test_clip_loss(benchmark: Any, rows: int) -> None:
    inputs = make(rows)
    losses: dict[str, Callable[..., torch.Tensor]] = {
        "ours": lambda u, v: clip_loss(u, v, SCALE),
        "plain PyTorch": plain,
        f"checkpointed in {CHUNK} rows": chunked,
    }
    expected = gradients(plain, inputs)
    for loss in losses.values():
        for found, right in zip(gradients(loss, inputs), expected, strict=True):
            assert (found - right).norm() <= 2e-5 * right.norm()
    steps = {name: lambda loss=loss: gradients(loss, inputs) for name, loss in losses.items()}
    seconds = medians(timed_rounds(steps, ROUNDS))
    benchmark.pedantic(steps["ours"], rounds=1)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    flops = 8 * rows**2 * WIDTH  # four products
    benchmark.extra_info["seconds"], benchmark.extra_info["peak_bytes"] = seconds, peaks
    benchmark.extra_info["saved_bytes"] = {name: hook_bytes(lambda f=f: f(*inputs)) for name, f in losses.items()}
    benchmark.extra_info["flops_per_second"] = flops / seconds["ours"]
    figures = {name: f"{1e3 * seconds[name]:.0f} ms, peak {peaks[name] / 2**20:.0f} MiB" for name in steps}
    benchmark.extra_info["row"] = {
        "what": f"Contrastive loss, {rows:,} pairs, D = {WIDTH} (forward + backward)",
        "ours": figures.pop("ours"),
        "peer": "; ".join(f"{name} {figure}" for name, figure in figures.items()),
        "how": "tlfast bench contrastive",
    }


def test_a_batch_whose_matrix_does_not_fit(benchmark: Any) -> None:
    """At 32,768 pairs the matrix alone takes 4 GiB, the plain form several of them; only ours is run."""
    rows = 32768
    inputs = make(rows)
    step = benchmark.pedantic(lambda: gradients(lambda u, v: clip_loss(u, v, SCALE), inputs), rounds=1)
    assert all(x.isfinite().all() for x in step)
    peak = peak_bytes(lambda: gradients(lambda u, v: clip_loss(u, v, SCALE), inputs))
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["peak_bytes"] = peak
    benchmark.extra_info["flops_per_second"] = 8 * rows**2 * WIDTH / seconds
    benchmark.extra_info["row"] = {
        "what": f"Contrastive loss, {rows:,} pairs, D = {WIDTH} (forward + backward)",
        "ours": f"{seconds:.1f} s, peak {peak / 2**20:.0f} MiB, of them gradients {2 * inputs[0].nbytes / 2**20:.0f}",
        "peer": f"one B x B matrix would take {4 * rows**2 / 2**20:,.0f} MiB",
        "how": "tlfast bench contrastive",
    }
