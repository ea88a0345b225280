"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data.errors import InputError


def check_new(out: Path) -> None:
    """InputError where something is at `out` already; an empty folder may be."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise InputError(f"{out}: is there already; pass another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name on success and is removed on failure.

    Raises InputError where `out` exists or cannot be written.
    """
    from ..training.folder import writing_to

    check_new(out)
    out = Path(os.path.abspath(out))
    created = [path for path in out.parents if not path.exists()]
    with writing_to(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.unfinished-", dir=out.parent))
            try:
                yield staging
                staging.chmod(0o777 & ~_umask())  # mkdtemp lets only the owner in
                os.replace(staging, out)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except BaseException:
            for path in created:
                with suppress(OSError):  # somebody else writes there too
                    path.rmdir()
            raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
