"""An .npy file that is written row by row over hours and appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data import InputError
from ..training.folder import write_whole, writing_to

SUFFIX = ".npy"
_SAVE_SECONDS = 2.0


class FeatureFile:
    """F.npy, an (N, D) float32 array. While it is unfinished, F.npy.part has its rows and F.npy.part.json what is done.

    done: rows that were written, in the order of the batches; cut: of them, those that lost their end. What a killed
    process wrote in its last two seconds may be written again.
    Raises InputError for a path that is no .npy file in a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix != SUFFIX:
            raise InputError(f"{path}: the features are an {SUFFIX} file; name one, such as {self.path.stem}{SUFFIX}")
        if self.path.is_dir():
            raise InputError(f"{path}: there is a folder of that name; pass another --out")
        if not self.path.parent.is_dir():
            raise InputError(f"{path}: its folder does not exist; make it, or pass another --out")
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.state = self.path.with_name(f"{self.path.name}.part.json")
        self.done = self.cut = 0
        self._saved = 0.0

    @property
    def unfinished(self) -> bool:
        """Whether there is a run to go on with."""
        return self.part.is_file() and self.state.is_file()

    @contextmanager
    def session(self, shape: tuple[int, int], settings: dict[str, Any], resume: bool) -> Iterator[None]:
        """Begin a run with these settings (JSON types), or go on with the one that is there; F.npy appears at the end.

        When the block fails before a row was written, the files are as they were before.
        Raises InputError where the disk is too small or unwritable, there is another run, or none to resume.
        """
        with writing_to(self.path):
            self._array = self._reopen(shape, settings) if resume else self._create(shape, settings)
            try:
                yield
            except BaseException:
                self._save() if self.done else self._withdraw()
                raise
            self._publish()

    def write(self, indices: Sequence[int], rows: np.ndarray, cut: int = 0) -> None:
        """Write rows (n, D) at these indices; the next of the batches."""
        self._array[np.asarray(indices)] = rows
        self.done += len(indices)
        self.cut += cut
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self._save()

    def _create(self, shape: tuple[int, int], settings: dict[str, Any]) -> np.memmap:
        if self.unfinished:
            raise InputError(f"{self.part}: holds an unfinished run; add --resume to go on with it, or remove it")
        self._settings = settings
        self._check_space(4 * shape[0] * shape[1])
        try:
            array = np.lib.format.open_memmap(self.part, mode="w+", dtype=np.float32, shape=shape)
            _allocate(self.part)
            self._array = array
            self._save()
        except BaseException:
            self._withdraw()
            raise
        return array

    def _reopen(self, shape: tuple[int, int], settings: dict[str, Any]) -> np.memmap:
        if not self.unfinished:
            raise InputError(f"{self.path}: there is no unfinished run to resume; leave --resume out to start one")
        try:
            state = json.loads(self.state.read_text(encoding="utf-8"))
            before, self.done, self.cut = state["settings"], state["done"], state["cut"]
            array = np.lib.format.open_memmap(self.part, mode="r+")
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.state}: the file is damaged; remove it and leave --resume out") from None
        for name in sorted(before.keys() | settings.keys()):
            if before.get(name) != settings.get(name):
                raise InputError(
                    f"{self.part}: the run there was started with {name}={before.get(name)!r}, not "
                    f"{settings.get(name)!r}; resume it with the same, or remove it and leave --resume out"
                )
        if (array.shape, array.dtype) != (shape, np.float32):
            raise InputError(f"{self.part}: holds {array.shape}, not {shape}; remove it and leave --resume out")
        self._settings = settings
        return array

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise InputError(
                f"{self.path}: needs {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free there; free some, "
                "or pass another --out"
            )

    def _save(self) -> None:
        """The rows first, so that none is counted that is not on the disk."""
        self._array.flush()
        state = {"settings": self._settings, "done": self.done, "cut": self.cut}
        write_whole(self.state, json.dumps(state, indent=2) + "\n")
        self._saved = time.monotonic()

    def _publish(self) -> None:
        self._array.flush()
        del self._array  # Windows renames no file that is mapped
        os.replace(self.part, self.path)
        self.state.unlink()

    def _withdraw(self) -> None:
        self.part.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)


def _allocate(path: Path) -> None:
    """Take the file's space now: writing to a map on a full disk kills the process instead of raising an error."""
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
