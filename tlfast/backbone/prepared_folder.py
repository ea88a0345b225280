"""The folder of a prepared backbone: its files, and what its manifest says.

frozen.json says what is where, frozen.safetensors holds the weights in the order in which the kernels of every machine
read them, config.json is transformers'. The files of a tokenizer may lie beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .skeleton import KINDS

MANIFEST, WEIGHTS, CONFIG, FORMAT = "frozen.json", "frozen.safetensors", "config.json", 1
AGAIN = "prepare it again"  # the way out of every damage
_KEYS = {"tlfast", "precision", "fingerprint", "name", "blocks", "weight_errors", "model", "layers", "entries", *KINDS}


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds a prepared backbone."""
    return (Path(folder) / MANIFEST).is_file()


def identity(description: dict[str, Any]) -> dict[str, str]:
    """By which the weights know their manifest."""
    return {name: str(description[name]) for name in ("format", "precision", "fingerprint")}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What frozen.json says. Raises ValueError where there is none, or it is damaged or of another format."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder; pass one that save_pretrained or tlfast freeze wrote")
    if not path.is_file():
        raise ValueError(
            f"{folder}: holds no prepared backbone ({MANIFEST} is missing); pass one that save_pretrained or "
            "tlfast freeze wrote"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); the file is damaged, {AGAIN}") from error
    if not isinstance(description, dict) or "format" not in description:
        raise ValueError(f"{path}: does not describe a prepared backbone; {AGAIN}")
    if description["format"] != FORMAT:
        raise ValueError(
            f"{path}: is of format {description['format']!r} (tlfast {description.get('tlfast')}), and this version "
            f"reads {FORMAT}; {AGAIN} with this version"
        )
    missing = sorted(_KEYS - description.keys())
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing; the file is damaged, {AGAIN}")
    return description
