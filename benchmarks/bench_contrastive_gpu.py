"""The contrastive loss on a CUDA GPU: with scores that would not fit, and beside the plain form under torch.compile.

bfloat16 inputs, forward + backward, agreement checked first. The rate counts four products and is set beside a bfloat16
product of the same operands; the peak is what the step takes beyond inputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tlfast.bench.measure import medians, timed_rounds
from tlfast.contrastive import clip_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE, ROUNDS = "cuda", 7
WIDTH, SCALE = 512, 20.0
LARGE, BOTH, CHECKED = 65536, 16384, 4096
Step = Callable[[], tuple[torch.Tensor, ...]]


def test_a_batch_whose_scores_would_not_fit(benchmark: Any) -> None:
    inputs = make(LARGE)
    step = gradients(ours, inputs)
    assert all(x.isfinite().all() for x in step())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = step()
    beyond = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in kept)
    del kept
    product = torch.empty(LARGE // 4, LARGE, dtype=torch.bfloat16, device=DEVICE)
    image, text = (x.detach() for x in inputs)
    functions = {"ours": step, "product": lambda: torch.mm(image[: LARGE // 4], text.T, out=product)}
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(step, rounds=1)
    rate = 2 * (LARGE // 4) * LARGE * WIDTH / seconds["product"]
    flops = 8 * LARGE**2 * WIDTH
    share = flops / seconds["ours"] / rate
    benchmark.extra_info.update(peak_bytes=beyond, gemm_flops_per_second=rate, share_of_gemm_rate=share)
    benchmark.extra_info["row"] = {
        "what": f"Contrastive loss, {LARGE:,} pairs, D = {WIDTH}, bf16 (forward + backward)",
        "ours": f"{1e3 * seconds['ours']:.0f} ms, {100 * share:.0f} % of the GEMM rate, peak {beyond / 2**20:.0f} MiB "
        "beyond inputs and gradients",
        "peer": f"one B x B matrix would take {2 * LARGE**2 / 2**20:,.0f} MiB; GEMM rate {rate / 1e12:.0f} TFLOP/s",
        "how": "benchmarks/gpu.sh",
    }


def test_beside_the_compiled_plain_form(benchmark: Any) -> None:
    compiled = torch.compile(plain)
    small = make(CHECKED)
    exact = gradients(plain, tuple(x.detach().float().requires_grad_() for x in small))()
    for found, peer, right in zip(gradients(ours, small)(), gradients(plain, small)(), exact, strict=True):
        error, allowed = ((x.float() - right).norm() for x in (found, peer))
        assert error <= 1.5 * allowed + 1e-6 * right.norm()
    inputs = make(BOTH)
    functions = {"ours": gradients(ours, inputs), "compiled": gradients(compiled, inputs)}
    seconds = medians(timed_rounds(functions, ROUNDS))
    benchmark.pedantic(functions["ours"], rounds=1)
    benchmark.extra_info["seconds"] = seconds
    benchmark.extra_info["row"] = {
        "what": f"Contrastive loss, {BOTH:,} pairs, D = {WIDTH}, bf16 (forward + backward)",
        "ours": f"{1e3 * seconds['ours']:.1f} ms, {seconds['compiled'] / seconds['ours']:.2f} x as fast",
        "peer": f"plain PyTorch under torch.compile {1e3 * seconds['compiled']:.1f} ms",
        "how": "benchmarks/gpu.sh",
    }


def make(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings of length 1 that need gradients."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    drawn = (torch.randn(rows, WIDTH, generator=generator, device=DEVICE) for _ in range(2))
    image, text = (F.normalize(x, dim=-1).bfloat16().requires_grad_() for x in drawn)
    return image, text


def ours(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The loss that is measured."""
    return clip_loss(image, text, SCALE)


def plain(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """As open_clip writes it, but for the second product: its logits for texts are the first's, transposed."""
    logits = (SCALE * image @ text.T).float()
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def gradients(loss: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Step:
    """A step: the loss and its gradients."""

    def step() -> tuple[torch.Tensor, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return step
