"""The folder of a run: who may write there, what can be resumed, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..data import InputError

RUN, METRICS, CHECKPOINTS = "run.json", "metrics.json", "checkpoints"
_OURS = (
    RUN, METRICS, CHECKPOINTS, "config.json", "model.safetensors", "task.json", "klite.json", "tokenizer",
    "image_processor", "curve.png", "schema.png",
)  # fmt: skip
_UNWRITABLE = {
    errno.ENOSPC: "no space left on the device; free some",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "not writable; change its permissions",
    errno.EPERM: "not writable; change its permissions",
    errno.EROFS: "on a read-only file system",
    errno.ENOENT: "its folder does not exist; make it",
    errno.EISDIR: "there is a folder of that name",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "there is a file of that name",
}


# safetensors passes the system's error on as text; torch.save's zip writer says one of the others, by where it fails
_FULL_DISK_MARKS = (f"os error {errno.ENOSPC}", "PytorchStreamWriter", "inline_container.cc", "iostream error")


class RunFolder:
    """Where a run keeps its state and leaves its results.

    run.json: the settings it was started with. checkpoints/: transformers' checkpoints. Results appear at the end,
    metrics.json last: a folder that has it is finished.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS

    @property
    def finished(self) -> bool:
        """Whether the run has its results."""
        return (self.path / METRICS).is_file()

    def read_metrics(self) -> dict[str, Any]:
        """The results of a finished run."""
        return json.loads((self.path / METRICS).read_text(encoding="utf-8"))

    @contextmanager
    def session(self, settings: dict[str, Any], resume: bool) -> Iterator[None]:
        """Claim the folder for a run with these settings (JSON types), or go on with the run that is there.

        When the block fails, what it left half-written goes, and without a whole checkpoint the run itself: the folder
        is then as it was before. Full and unwritable disks become InputErrors.
        Raises InputError where the folder holds another run, or none to resume.
        """
        with writing_to(self.path):
            if resume:
                self._check_same(settings)
                remove_unfinished_checkpoints(self.checkpoints)
            else:
                self._check_free()
            created = _missing_folders(self.path)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                with self.publish() as staging:
                    _write_json(staging / RUN, settings)
                yield
            except BaseException:
                self._withdraw(created)
                raise

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint to resume from."""
        return any(_is_whole(path) for path in _all_checkpoints(self.checkpoints))

    def _withdraw(self, created: list[Path]) -> None:
        remove_unfinished_checkpoints(self.checkpoints)
        if self.has_checkpoint():
            return
        (self.path / RUN).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for folder in created:
            with suppress(OSError):  # not empty: somebody else writes there too
                folder.rmdir()

    def _check_free(self) -> None:
        found = [name for name in _OURS if (self.path / name).exists()]
        if found:
            raise InputError(
                f"{self.path}: already holds a run ({found[0]}); add --resume to go on with it or pass another --out"
            )

    def _check_same(self, settings: dict[str, Any]) -> None:
        path = self.path / RUN
        if not path.is_file():
            raise InputError(f"{self.path}: holds no run to resume; leave --resume out to start one")
        before = _flat(json.loads(path.read_text(encoding="utf-8")))
        now = _flat(json.loads(json.dumps(settings)))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{self.path}: the run there was started with {name}={before.get(name)!r}, not {now.get(name)!r}; "
                    "resume it with the same settings or pass another --out"
                )

    @contextmanager
    def publish(self) -> Iterator[Path]:
        """A temporary folder whose files are renamed into the run's folder on success and removed on failure.

        metrics.json is renamed last, since it marks the run as finished.
        """
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=self.path))
        try:
            yield staging
            for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == METRICS):
                target = self.path / entry.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(entry, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def write_metrics(self, folder: Path, metrics: dict[str, Any]) -> None:
        """Write metrics.json into a folder given by `publish`."""
        _write_json(folder / METRICS, metrics)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what a full or unwritable disk raises into an InputError that names `path`; let all else through.

    torch.save and safetensors report a full disk in their own ways, not as OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise InputError(f"{path}: {_UNWRITABLE[error.errno]}, or pass another --out") from error
    except (RuntimeError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        raise InputError(f"{path}: {_UNWRITABLE[errno.ENOSPC]}, or pass another --out") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it and rename it; InputError where that cannot be written."""
    temporary = path.with_name(f".{path.name}.unfinished")
    with writing_to(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # of no interest where the write itself failed
                temporary.unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint-N in a folder, or None."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    return max(whole, key=_step, default=None)


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove checkpoints, at any depth, that a crash or a full disk cut short."""
    for path in _all_checkpoints(folder):
        if not _is_whole(path):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _all_checkpoints(folder: Path) -> list[Path]:
    """Those of a single learning rate, and those of several, which have a folder each."""
    return [*_checkpoints(folder), *(path for rate in folder.glob("lr-*") for path in _checkpoints(rate))]


def _missing_folders(path: Path) -> list[Path]:
    """The folders that mkdir(parents=True) would make, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(checkpoint: Path) -> bool:
    """Trainer writes trainer_state.json last, so a checkpoint that has it has all."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _disk_is_full(error: Exception) -> bool:
    return any(mark in str(error) for mark in _FULL_DISK_MARKS)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: {"ladder": {"reduction": 8}} -> {"ladder.reduction": 8}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
