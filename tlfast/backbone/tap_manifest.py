"""What a tap cache says of itself, and what is said where it is another than the one that is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST, FORMAT = "manifest.json", 1
_NAMES = {
    "format": "format",
    "tlfast": "the version of tlfast",
    "fingerprint": "the backbone",
    "precision": "the backbone's precision",
    "tokenizer": "the tokenizer or image processor",
    "max_length": "the greatest length",
    "data": "the data",
    "taps": "the tapped blocks",
    "storage": "the storage",
    "parts": "the shapes of the taps",
    "samples": "the number of samples",
    "tokens": "the number of tokens",
}
_SHOWN = 16  # characters of a digest
_OTHER = "pass another folder for the cache, or remove this one"


def claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the folder a cache that is described so (plain JSON types), or see that it is.

    Raises ValueError, naming what differs, where it is another cache or holds other things; OSError where it cannot be
    written.
    """
    path = folder / MANIFEST
    if path.is_file():
        _check(path, wanted)
        return
    if folder.is_dir() and any(not entry.name.startswith((".", MANIFEST)) for entry in folder.iterdir()):
        raise ValueError(f"{folder}: holds files and no {MANIFEST}, so it is no cache of taps; {_OTHER}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{MANIFEST}.unfinished-{os.getpid()}"  # several processes may claim it together
    try:
        temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(description: dict[str, Any]) -> str:
    """By which a shard knows its manifest."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _check(path: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: the file is damaged; {_OTHER}")
    for name, here in wanted.items():
        if name not in found:
            raise ValueError(f"{path}: {name!r} is missing; the file is damaged; {_OTHER}")
        if found[name] != here:
            difference = f"{_short(found[name])} there, {_short(here)} here"
            raise ValueError(f"{path.parent}: the cache there differs in {_NAMES[name]} ({difference}); {_OTHER}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}..."
