"""One call of transformers' own modules: what they are passed, and what the blocks give on the way."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .outputs import Visit
from .stack import Stack

EMBEDDING = -1  # the input of block 0, beside the blocks' indices
_REGISTERING = threading.Lock()


@contextmanager
def capture(stack: Stack, visit: Visit | None = None) -> Iterator[dict[int, torch.Tensor]]:
    """Forward hooks for the time of one call: the caller's model is left as it was.

    Inside, what block 0 reads is kept as EMBEDDING, and each tap by its index; with `visit` they are handed to that as
    they come, and of them the embedding alone is kept. The hooks see this thread's call alone: others may run the
    shared model at the same time.
    """
    seen: dict[int, torch.Tensor] = {}

    def see(index: int, x: torch.Tensor) -> None:
        if visit is None or index == EMBEDDING:
            seen[index] = x
        if visit is not None:
            visit(x)

    thread = threading.get_ident()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            see(EMBEDDING, args[0] if args else kwargs["hidden_states"])

    def keep(index: int) -> Any:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                see(index, output[0] if isinstance(output, tuple) else output)

        return after

    with _REGISTERING:  # PyTorch numbers hooks without a lock
        handles = [stack.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [stack.blocks[index].register_forward_hook(keep(index)) for index in stack.taps]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@functools.cache
def _parameters(module_class: type) -> tuple[str, ...]:
    """What the forward of a class takes; asked for every token."""
    return tuple(inspect.signature(module_class.forward).parameters)  # type: ignore[attr-defined]


def cache_arguments(module: nn.Module, cache: Any) -> dict[str, Any]:
    """How this decoder takes a cache: transformers 5.20 renamed past_key_values."""
    kind: Any = type(module)
    names = _parameters(kind)
    arguments: dict[str, Any] = {"use_cache": cache is not None} if "use_cache" in names else {}
    if cache is not None:
        arguments["cache" if "cache" in names else "past_key_values"] = cache
    return arguments
