"""Inputs of contrastive losses, their plain formulas with the B x B matrix, and the comparison with float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.ops.interpreter import interpreted
from tlfast import _native

needs_native = pytest.mark.skipif(_native.why_not() is not None, reason=str(_native.why_not()))
NATIVE = pytest.param("native", marks=needs_native)
TRITON = pytest.param("triton", marks=interpreted)
LEAN = ["recompute", NATIVE, TRITON]
IMPLS = ["reference", *LEAN]
LABELS = ["equal", "distinct", "mixed", "own"]
Loss = Callable[..., torch.Tensor]


def make(rows: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu", spread: float | None = None):
    """Normalised embeddings; with `spread` texts lie that near their images, as at the end of training."""
    torch.manual_seed(rows * 1000 + width)
    image, text = torch.randn(rows, width), torch.randn(rows, width)
    image = F.normalize(image, dim=-1)
    text = F.normalize(text if spread is None else image + spread * text / width**0.5, dim=-1)
    return image.to(device, dtype), text.to(device, dtype)


def make_labels(kind: str, rows: int) -> torch.Tensor:
    """Equal; distinct; mixed: about 3 of each; own: some repeated and many -1."""
    generator = torch.Generator().manual_seed(rows)
    if kind == "equal":
        return torch.full((rows,), 7)
    if kind == "distinct":
        return torch.randperm(rows, generator=generator)
    few = max(1, rows // (3 if kind == "mixed" else 8))
    return torch.randint(0 if kind == "mixed" else -few, few, (rows,), generator=generator).clamp(min=-1)


def plain_unicl(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """UniCL's loss as its authors write it: soft targets, rows normalised, cross-entropy in both directions."""
    logits = scale * image @ text.T
    alone = -1 - torch.arange(len(labels), device=labels.device)
    labels = torch.where(labels < 0, alone, labels)
    targets = (labels[:, None] == labels).to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def plain_clip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def plain_siglip(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def results(loss: Loss, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The loss and its gradients, of copies of the inputs in a dtype."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    value = loss(*leaves)
    names = ("dimage", "dtext", "dscale", "dbias")
    return {"loss": value.detach()} | dict(zip(names, torch.autograd.grad(value, leaves), strict=False))


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """|found - exact| / |exact|; what float64 itself cannot tell from 0 (its plain formula has p - 1) counts as 0."""
    exact = exact.detach().double()
    norm = float(exact.norm())
    error = float((found.detach().double() - exact).norm())
    return 0.0 if error < 1e-13 else error / norm
