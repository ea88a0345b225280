"""Inputs and runs that the tests of the rung share."""

from __future__ import annotations

import torch

from tests.budget import assert_within_budget
from tlfast.ops import rung

NAMES = ("z", "ds", "dweight", "dbias", "dalpha")


def make(
    shape: tuple[int, ...],
    depth: int,
    width: int,
    h_dtype: torch.dtype = torch.float32,
    s_dtype: torch.dtype = torch.float32,
    per_channel: bool = False,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """h, s, weight, bias, alpha of a rung as training meets them: gates near one half, products of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    h = normal(*shape, depth).to(h_dtype)
    s = normal(*shape, width).to(s_dtype).requires_grad_()
    weight = (normal(width, depth) / max(depth, 1) ** 0.5).requires_grad_()
    alpha = (0.1 * normal(*((width,) if per_channel else ()))).requires_grad_()
    return h, s, weight, normal(width).requires_grad_() if bias else None, alpha


def some_dz(inputs: tuple) -> torch.Tensor:
    """A gradient for z, exactly representable in its dtype."""
    s = inputs[1]
    return torch.cos(torch.arange(s.numel(), device=s.device)).view(s.shape).to(s.dtype)


def run(inputs: tuple, impl: str, dz: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Output and gradients by name."""
    z = rung(*inputs, impl=impl)
    wanted = [x for x in inputs[1:] if x is not None]
    grads = iter(torch.autograd.grad(z, wanted, some_dz(inputs) if dz is None else dz))
    return {"z": z.detach()} | {
        name: next(grads) for name, x in zip(NAMES[1:], inputs[1:], strict=True) if x is not None
    }


def in_float64(inputs: tuple) -> tuple:
    return tuple(None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs)


def cost_of_rounding_z(inputs: tuple, z: torch.Tensor, dz: torch.Tensor) -> torch.Tensor:
    """What dalpha = mu/T sum dz (s - z) moves by when each z is rounded once, independently: a root of squares."""
    s, alpha = inputs[1].detach(), inputs[4].detach().double()
    moved = (dz.double() * z * torch.finfo(s.dtype).eps).square()
    total = moved.sum() if alpha.numel() == 1 else moved.reshape(-1, alpha.numel()).sum(0)
    return (torch.sigmoid(alpha / 0.1) / 0.1 * total.sqrt()).view(alpha.shape)


def assert_accurate(cases: list[tuple], impl: str, dz: torch.Tensor | None = None) -> None:
    """Errors are pooled over the cases: a single sum may be exact in one of them by luck."""
    pooled: dict[str, list[list[torch.Tensor]]] = {}
    for inputs in cases:
        given = some_dz(inputs) if dz is None else dz
        ours, plain = run(inputs, impl, given), run(inputs, "reference", given)
        exact = run(in_float64(inputs), "reference", given.double())
        for name in ours:
            rounding = torch.zeros_like(exact[name])
            if name == "dalpha":
                rounding = cost_of_rounding_z(inputs, exact["z"], given)
            assert ours[name].shape == plain[name].shape, name
            pooled.setdefault(name, []).append([ours[name], plain[name], exact[name], rounding])
    for name, results in pooled.items():
        assert_within_budget(f"{impl} {name}", *(torch.stack(tensors) for tensors in zip(*results, strict=True)))
