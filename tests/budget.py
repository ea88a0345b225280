"""Error budgets from data: ours may err as plain PyTorch does at the same dtype, by half as much again at most."""

from __future__ import annotations

import torch

FACTOR = 1.5


def assert_within_budget(
    name: str, ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, rounding: torch.Tensor | float = 0.0
) -> None:
    """|ours - exact| <= 1.5 |plain - exact| + tiny, in the mean and at the worst element; exact is float64.

    tiny is one rounding of the result's dtype: where plain PyTorch happens to be exact, ours may round once.
    `rounding`, shaped like exact, adds what rounding a kept tensor costs a method that computes from it as kept.
    """
    assert ours.shape == plain.shape == exact.shape, f"{name}: {ours.shape}, {plain.shape}, {exact.shape}"
    assert ours.dtype == plain.dtype, f"{name}: {ours.dtype} against {plain.dtype}"
    if not exact.numel():
        return
    assert torch.isfinite(ours).all(), f"{name}: not finite, or not written"
    scale = exact.abs() * torch.finfo(ours.dtype).eps + rounding
    ours_error, plain_error = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    for what, reduce in (("mean", torch.mean), ("worst", torch.max)):
        allowed = FACTOR * reduce(plain_error) + reduce(scale)
        assert reduce(ours_error) <= allowed, f"{name}: {what} error {reduce(ours_error):.3e}, allowed {allowed:.3e}"
