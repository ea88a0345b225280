"""The sum and its gradient in plain PyTorch, a part of the tokens at a time: any device.

The layer is frozen, so the gradient by what it reads is all that is asked for, and a part's logits are at hand when its
loss is: each part is made once, and gone before the next.
"""

from __future__ import annotations

import torch

from .head import Head
from .parts import parts

# Logits that exist at once (16 MiB in float32), or as many as hidden has numbers; one token's where that is more.
MAP_ELEMENTS = 2**22


def linear_cross_entropy(
    hidden: torch.Tensor, head: Head, labels: torch.Tensor, ignored: int, need_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the losses, and its gradient by hidden (T, D). Tokens without a label cost nothing."""
    head = head.read_in(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = (labels != ignored).nonzero()[:, 0]
    whole = len(kept) == len(labels)
    read, wanted = (hidden, labels) if whole else (hidden[kept], labels[kept])
    losses = torch.zeros(len(wanted), dtype=wide, device=hidden.device)
    gradient = torch.empty_like(read) if need_gradient else None
    matrix = head.matrix(hidden.dtype) if need_gradient else None
    for part in parts(len(wanted), rows_at_once(len(hidden), hidden.shape[1], head.shape[0])):
        into = None if gradient is None else gradient[part]
        losses[part] = _losses(head, matrix, read[part], wanted[part], into)
    if gradient is not None and not whole:
        gradient = torch.zeros_like(hidden).index_copy_(0, kept, gradient)
    return losses.sum(), gradient


def rows_at_once(tokens: int, width: int, vocabulary: int) -> int:
    """How many tokens' logits exist at once."""
    return max(1, max(MAP_ELEMENTS, tokens * width) // max(1, vocabulary))


def _losses(
    head: Head,
    matrix: torch.Tensor | None,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """The losses of a part; their gradient is written where it belongs. The logits are gone when this returns."""
    logits, slope = _logits(head, hidden)
    losses = _to_probabilities(logits, labels)
    if gradient is not None and matrix is not None:
        logits[torch.arange(len(logits), device=logits.device), labels] -= 1
        if slope is not None:
            logits *= slope
        torch.mul(logits.to(matrix.dtype) @ matrix, head.scale, out=gradient)
    return losses


def _logits(head: Head, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits, which may be overwritten, and their derivative by what the cap is laid on; None without one."""
    logits, slope = head.product(hidden).to(torch.promote_types(hidden.dtype, torch.float32)), None
    if head.cap is not None:
        logits = logits.div_(head.cap).tanh_()
        slope = 1 - logits.square()
        logits *= head.cap
    if head.bias is not None:
        logits += head.bias
    return logits, slope


def _to_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax of each row's label; the logits become the softmax."""
    logits -= logits.amax(dim=1, keepdim=True)
    own = logits.gather(1, labels[:, None])[:, 0]
    sums = logits.exp_().sum(dim=1)
    logits /= sums[:, None]
    return sums.log() - own
