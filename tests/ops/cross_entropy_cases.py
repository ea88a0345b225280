"""Heads, tokens and labels, and the cross-entropy as a model's own code computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.budget import assert_within_budget
from tlfast.ops import linear_cross_entropy

SETTINGS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"cap": 3.0},
    "all": {"scale": 0.5, "cap": 5.0, "bias": True},
}


def make(tokens, vocabulary=37, width=24, dtype=torch.float32, ignored=True, seed=0, device="cpu"):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    if ignored:
        labels[::3] = -100
    return hidden.to(device), weight.to(device), labels.to(device)


def settings_of(name, vocabulary=37, device="cpu"):
    found = dict(SETTINGS[name])
    if found.pop("bias", False):
        found["bias"] = torch.linspace(-1, 1, vocabulary, device=device)
    return found


def plain(hidden, weight, labels, bias=None, scale=1.0, cap=None, reduction="mean"):
    """As a model's own forward and loss compute it."""
    logits = F.linear(hidden * scale, weight)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if bias is not None:
        logits = logits + bias
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction=reduction)


def with_gradient(function, hidden, *arguments, **settings):
    hidden = hidden.clone().requires_grad_()
    loss = function(hidden, *arguments, **settings)
    (3.0 * loss).backward()
    return loss.detach(), hidden.grad


def assert_accurate(sizes, dtype, settings, impl, device="cpu"):
    """Loss and gradient err as those of plain PyTorch do. sizes: tokens, vocabulary and width."""
    tokens, vocabulary, _ = sizes
    found = settings_of(settings, vocabulary, device)
    for reduction in ("mean", "sum"):
        ours, theirs, exact = [], [], []
        for seed in range(8):  # one loss may be right by chance
            hidden, weight, labels = make(*sizes, dtype, ignored=tokens > 1, seed=seed, device=device)
            given = {**found, "reduction": reduction}
            ours.append(with_gradient(linear_cross_entropy, hidden, weight, labels, **given, impl=impl))
            theirs.append(with_gradient(plain, hidden, weight, labels, **given))
            exact.append(with_gradient(plain, hidden.double(), weight.double(), labels, **given))
        losses, gradients = ([torch.stack([x[i] for x in y]) for y in (ours, theirs, exact)] for i in (0, 1))
        # a difference of two logits, of which each is rounded; plain PyTorch's is exact where there is but one
        rounding = torch.finfo(torch.float32).eps * (hidden.double() @ weight.double().T).abs().max()
        assert_within_budget("loss", *losses, rounding)
        # ours rounds the gradient of the sum, and once more what scales it
        assert_within_budget("gradient", *gradients, gradients[2].abs() * torch.finfo(dtype).eps)
