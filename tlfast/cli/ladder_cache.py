"""--cache of tlfast ladder train: where the taps of a run's data are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import InputError
from .backbone import LoadedBackbone
from .output import note, on_terminal

if TYPE_CHECKING:
    from ..ladder import LadderModel
    from ..training import Task, TaskData


def storage_of(cache: Path | None, storage: str | None) -> str:
    """The storage of --cache, which alone gives --cache-storage a meaning."""
    from ..backbone.tap_parts import STORAGES

    if storage is None:
        return "exact"
    if cache is None:
        raise InputError("--cache-storage: means nothing without --cache; add it, or leave this out")
    if storage not in STORAGES:
        raise InputError(f"--cache-storage {storage!r}: is not available; choose one of {', '.join(STORAGES)}")
    return storage


def on_cache(
    ladder: LadderModel,
    data: TaskData,
    task: Task,
    loaded: LoadedBackbone,
    folder: Path,
    storage: str,
    quiet: bool,
) -> tuple[TaskData, dict[str, Any]]:
    """The data with their taps in the cache, filled behind a progress bar; and what metrics.json says of it."""
    import torch
    from tqdm import tqdm

    from .. import features, training

    frozen = ladder.to("cuda" if torch.cuda.is_available() else "cpu").backbone
    identity = {
        "fingerprint": frozen.fingerprint(),
        "precision": frozen.precision,
        "tokenizer": features.identify(loaded.tokenizer),
        "max_length": task.max_length,
        "taps": {name: list(stack.taps) for name, stack in frozen.stacks.items()},
    }
    reader = training.TapReader(ladder.look, identity, next(frozen.parameters()).device)
    with tqdm(desc="taps", unit="row", leave=False, disable=quiet or not on_terminal()) as bar:

        def begin(total: int) -> Callable[[int], Any]:
            bar.reset(total)
            return bar.update

        seen, report = training.on_cache(data, folder, reader, storage, begin)
    if not quiet:
        size, new = (f"{count / 2**20:,.1f} MiB" for count in (report.bytes, report.filled_bytes))
        note(f"{folder}: {size} of taps, of them new {new}, {report.seconds:.1f} s")
    return seen, {"cache": asdict(report)}
