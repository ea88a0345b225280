"""Where a demo leaves its results: all of them or none, and never in place of what is not an earlier demo's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data import InputError

METRICS = "metrics.json"


@contextmanager
def demo_folder(out: Path, title: str, names: Sequence[str]) -> Iterator[Path]:
    """A folder whose content appears in `out` at the end; on failure `out` is as it was.

    names: what the demo leaves there beside metrics.json, which holds its title.
    Raises InputError where `out` has something of these names that is not this demo's, or cannot be written.
    """
    from ..training.folder import RunFolder, writing_to

    _check_free(out, title, [*names, METRICS])
    existed = out.exists()
    with writing_to(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            with RunFolder(out).publish() as staging:
                yield staging
        except BaseException:
            if not existed:
                with suppress(OSError):  # not made, or somebody else writes there too
                    out.rmdir()
            raise


def _check_free(out: Path, title: str, names: Sequence[str]) -> None:
    """Refuse to replace what is not an earlier demo's: its names are common ones."""
    found = [name for name in names if (out / name).exists()]
    if not found:
        return
    try:
        ours = json.loads((out / METRICS).read_text(encoding="utf-8"))["title"] == title
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise InputError(f"{out}: has a {found[0]} that is not the demo's; pass another --out")
