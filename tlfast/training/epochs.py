"""The state of a training loop of our own after each epoch, in a run's checkpoints folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..data.errors import InputError
from .folder import last_checkpoint

_STATE, _WHOLE = "state.pt", "trainer_state.json"  # the second is written last: `last_checkpoint` asks for it


def keep_state(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and their containers as checkpoint-<epoch>; those before it go."""
    checkpoint = folder / f"checkpoint-{epoch}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    torch.save(state, checkpoint / _STATE)
    (checkpoint / _WHOLE).write_text(json.dumps({"epoch": epoch}) + "\n", encoding="utf-8")
    for other in folder.glob("checkpoint-*"):
        if other != checkpoint:
            shutil.rmtree(other)


def last_state(folder: Path) -> dict[str, Any] | None:
    """The newest whole state, None where there is none; nothing but tensors and plain values is unpickled.

    Raises InputError for a damaged one.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return None
    try:
        return torch.load(checkpoint / _STATE, weights_only=True)
    except Exception as error:  # torch.load has no exception of its own: what it raises depends on where it fails
        raise InputError(
            f"{checkpoint}: is damaged ({type(error).__name__}); delete {folder} and start again"
        ) from error
