"""A folder with what was trained on a frozen model: model.safetensors and config.json. Never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write_trained(folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Write both files under temporary names and rename them, so that a failure leaves nothing half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = {name: folder / f".{name}.partial" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(weights, temporary[WEIGHTS], metadata={"format": "pt"})
        temporary[CONFIG].write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def load_trained(folder: Path, model: nn.Module, what: str) -> None:
    """Load the weights in a folder; ValueError where they are missing, damaged or of another shape.

    what: was saved, as the error asks for it again.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing; save the {what} again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error}); save the {what} again") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{path}: does not fit config.json beside it (first at {wrong[0]}); save the {what} again")
    model.load_state_dict(weights)
