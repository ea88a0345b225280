"""The processes of a run that torchrun or accelerate started: which one speaks and writes, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that a launcher started; alone, nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    try:
        yield
    finally:
        dist.destroy_process_group()
        PartialState._reset_state()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return 0 if count() == 1 else dist.get_rank()


def is_first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def wait() -> None:
    """Go on when all processes are here; a launcher ends them all where one fails."""
    if count() > 1:
        dist.barrier()


def any_of(mine: bool) -> bool:
    """Whether it holds in any process; each must ask."""
    if count() == 1:
        return mine
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(mine), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
