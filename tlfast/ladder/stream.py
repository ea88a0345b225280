"""Taps that are not kept: in the backward pass the backbone runs once more, and each is used as it comes by.

The gradient of a projection is dz^T h, and dz is as narrow as the side network. So the side network's backward pass
leaves dz of each rung behind, and when the last rung has had its turn a second frozen forward, without a graph as the
first, multiplies each tap with it and drops it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..ops import rung_gradients
from .rung import Entrance, Rung, dotted, through_gate
from .tap_storage import Keep, as_autocast

Run = Callable[[dict[str, torch.Tensor], Callable[[torch.Tensor], None]], None]


@dataclass
class _Place:
    """What enters the side network at one place, and what the backward pass of the side network leaves there."""

    module: Entrance | Rung
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # as it was when the tap came in
    dz: torch.Tensor | None = None
    dz_z: torch.Tensor | None = None  # the sum of dz * z, for the gate

    @property
    def parameters(self) -> list[torch.Tensor]:
        alpha = [self.module.alpha] if isinstance(self.module, Rung) else []
        return [self.module.weight, self.module.bias, *alpha]

    def gradients(self, h: torch.Tensor) -> list[torch.Tensor | None]:
        """What the parameters get, from the state that came in here."""
        if self.dz is None or self.dz_z is None:  # nothing that the loss depends on came from here
            return [None for _ in self.parameters]
        weight, bias, *alpha = self.parameters
        temperature = self.module.temperature if isinstance(self.module, Rung) else 1.0
        with self.autocast():
            dweight, dbias, dalpha = rung_gradients(
                as_autocast(h), self.dz, self.dz_z, weight, bias, alpha[0] if alpha else None, temperature
            )
        self.dz = self.dz_z = None
        grads: list[torch.Tensor | None] = [dweight.to(weight.dtype), dbias.to(bias.dtype)]
        return grads if dalpha is None else [*grads, dalpha.to(alpha[0].dtype)]


class Stream(Keep):
    """The taps of one forward, of all stacks that it runs.

    modules: where they enter, in the order of the forward: of each stack the entrance, then the rungs.
    inputs: of the frozen forward. run(inputs, visit): runs it, and hands the taps to `visit` in that order.
    """

    def __init__(self, modules: list[Entrance | Rung], inputs: dict[str, torch.Tensor], run: Run) -> None:
        places = [_Place(module) for module in modules]
        self.places = iter(places)
        parameters = [parameter for place in places for parameter in place.parameters]
        again = _Again(places, list(inputs), run, _autocast_now(parameters[0].device.type))
        # all rungs read it, so its own backward comes after theirs
        self.last_in_backward = _SecondForward.apply(again, len(parameters), *parameters, *inputs.values())

    def enter(self, entrance: Entrance, embedding: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            s = entrance(embedding)
        return _Enter.apply(self.last_in_backward, s, self._next(entrance))

    def climb(self, rung: Rung, tap: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return _Climb.apply(self.last_in_backward, s, tap, self._next(rung))

    def _next(self, module: Entrance | Rung) -> _Place:
        place = next(self.places)
        assert place.module is module
        place.autocast = _autocast_now(module.weight.device.type)
        return place


@dataclass
class _Again:
    """What the second forward needs beside tensors."""

    places: list[_Place]
    names: list[str]
    run: Run
    autocast: Callable[[], AbstractContextManager[Any]]

    def gradients(self, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor | None]:
        places = iter(self.places)
        found: list[torch.Tensor | None] = []
        with torch.no_grad(), self.autocast():
            self.run(
                dict(zip(self.names, inputs, strict=True)),
                lambda h: found.extend(next(places).gradients(h)),
            )
        return found


class _SecondForward(torch.autograd.Function):
    """Depends on all weights that read a tap; what it gives has no meaning but to be read by all who read one."""

    @staticmethod
    def forward(ctx: Any, again: _Again, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)  # so that PyTorch sees to it that nobody writes to them in between
        ctx.again, ctx.count = again, count
        return tensors[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors[ctx.count :]
        return None, None, *ctx.again.gradients(inputs), *(None for _ in inputs)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: torch.Tensor, s: torch.Tensor, place: _Place) -> torch.Tensor:
        ctx.place = place
        return s.view_as(s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ds: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.place.dz, ctx.place.dz_z = ds, ds.new_zeros(())
        return ds.new_zeros(()), None, None


class _Climb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, last: torch.Tensor, s: torch.Tensor, tap: torch.Tensor, place: _Place) -> torch.Tensor:
        module: Any = place.module
        z = module(tap, s)
        ctx.save_for_backward(z, module.alpha)
        ctx.place = place
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, alpha = ctx.saved_tensors
        place: Any = ctx.place
        place.dz, place.dz_z = dz, dotted(dz, z)
        return dz.new_zeros(()), through_gate(dz, alpha, place.module.temperature), None, None


def _autocast_now(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes autocast again what it is now, in a backward pass that runs inside or outside of it."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
