"""One shard of a tap cache: a safetensors file of some samples' taps that is there whole or not at all.

Of each part and column it has one tensor of rows; a sample's rows lie together, slot behind slot: sample i has the rows
from slots * offsets[i] to slots * offsets[i + 1], which are (slots, tokens, width). `offsets` count tokens, `sums` are
checks on each sample. How it looks is known before a backbone runs, so it is written in any order, and everything but
the numbers themselves is checked before it is read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .tap_parts import Part, Storage
from .tensor_file import layout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_ZEROS = 0x9E3779B97F4A7C15  # the check on nothing but zeros, which is what lost blocks of a file read as


class Shard:
    """What one shard looks like. counts: tokens of each of its samples, by stack; metadata: by which it is known."""

    def __init__(
        self,
        path: Path,
        parts: Sequence[Part],
        storage: Storage,
        counts: Mapping[str, np.ndarray],
        metadata: dict[str, str],
    ) -> None:
        self.path, self.parts, self.storage = path, parts, storage
        self.offsets = {stack: np.concatenate([[0], np.cumsum(n, dtype=np.int64)]) for stack, n in counts.items()}
        self.samples = len(next(iter(counts.values())))
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for part in parts:
            rows = len(part.slots) * int(self.offsets[part.stack][-1])
            for column in storage.columns(part):
                entries[part.name + column.suffix] = column.dtype, (rows, *column.shape)
            entries[f"{part.name}.offsets"] = torch.int64, (self.samples + 1,)
            entries[f"{part.name}.sums"] = torch.int64, (self.samples,)
        self.places = layout(entries, metadata)
        self._bounds = {part: self._bounds_of(part) for part in parts}

    def is_whole(self) -> bool:
        """Whether the file is there, is of this cache and has its length."""
        try:
            with self.path.open("rb") as file:
                header = file.read(len(self.places.header))
                return header == self.places.header and os.fstat(file.fileno()).st_size == self.places.size
        except FileNotFoundError:
            return False

    def pieces(self, part: Part, number: int) -> Iterator[tuple[int, int]]:
        """First byte and end of a sample in each column of a part."""
        for bounds in self._bounds[part]:
            yield int(bounds[number]), int(bounds[number + 1])

    def _bounds_of(self, part: Part) -> list[np.ndarray]:
        rows = len(part.slots) * self.offsets[part.stack]
        columns = self.storage.columns(part)
        return [self.places.starts[part.name + column.suffix] + column.row_bytes * rows for column in columns]

    @contextmanager
    def writing(self) -> Iterator[ShardWriter]:
        """Write the shard under another name, which it loses when the block ends well and its bytes are on the disk.

        Raises BlockingIOError where another process is writing it, OSError for a full disk.
        """
        path = self.path.with_name(f".{self.path.name}.unfinished")
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            _claim(file, path)
            try:
                file.truncate(0)
                _allocate(file, self.places.size)
                writer = ShardWriter(self, file)
                yield writer
                writer.finish()
                os.replace(path, self.path)
                _sync_folder(self.path.parent)
            except BaseException:
                path.unlink(missing_ok=True)
                raise


class ShardWriter:
    """Puts samples into a shard that is being written."""

    def __init__(self, shard: Shard, file: IO[bytes]) -> None:
        self._shard, self._file = shard, file
        self._sums = {part.name: np.zeros(shard.samples, dtype=np.uint64) for part in shard.parts}
        self._write(0, shard.places.header)
        for part in shard.parts:
            self._write(shard.places.starts[f"{part.name}.offsets"], shard.offsets[part.stack].tobytes())

    def put(self, part: Part, number: int, rows: torch.Tensor) -> None:
        """Write one sample's rows of a part, (slots, tokens, width) on the CPU."""
        shard = self._shard
        stored = [_bytes(column) for column in shard.storage.encode(rows.flatten(0, 1))]
        for data, (first, end) in zip(stored, shard.pieces(part, number), strict=True):
            assert len(data) == end - first, "a sample has other tokens than the cache was told"
            self._write(first, data)
        self._sums[part.name][number] = check_sum(stored)

    def finish(self) -> None:
        """Write what is known at the end, and wait until the disk has it all."""
        for name, sums in self._sums.items():
            self._write(self._shard.places.starts[f"{name}.sums"], sums.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write(self, place: int, data: Any) -> None:
        self._file.seek(place)
        self._file.write(data)


class ShardReader:
    """A whole shard, mapped into memory. Raises ValueError where it is not whole."""

    def __init__(self, shard: Shard) -> None:
        if not shard.is_whole():
            raise ValueError(f"{shard.path}: is missing, cut short or not of this cache; fill the cache again")
        self._shard = shard
        with shard.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._sums = {part.name: self._numbers(f"{part.name}.sums") for part in shard.parts}

    def expect(self, number: int) -> None:
        """Let the system begin to read a sample that will be asked for."""
        if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
            return
        for part in self._shard.parts:
            for first, end in self._shard.pieces(part, number):
                page = first - first % mmap.PAGESIZE
                if end > page:
                    self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def forget(self) -> None:
        """Take what was read out of this process, or a whole cache would count as its memory in time."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def read(self, part: Part, number: int) -> list[np.ndarray]:
        """A sample's bytes in each column of a part; ValueError where they are not those that were written."""
        stored = [self._bytes[first:end] for first, end in self._shard.pieces(part, number)]
        if check_sum(stored) != int(self._sums[part.name][number]):
            raise ValueError(f"{self._shard.path}: is damaged; remove it and fill the cache again")
        return stored

    def _numbers(self, name: str) -> np.ndarray:
        start = self._shard.places.starts[name]
        return self._bytes[start : start + 8 * self._shard.samples].view(np.uint64).copy()


def check_sum(stored: Sequence[np.ndarray]) -> int:
    """64-bit sum of the words of some bytes: at the speed of memory, and a changed word always changes it."""
    total = _ZEROS
    for data in stored:
        whole = len(data) - len(data) % 8
        total += int(np.add.reduce(data[:whole].view(np.uint64))) + int.from_bytes(data[whole:].tobytes(), "little")
    return total % 2**64


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _claim(file: IO[bytes], path: Path) -> None:
    """Lock a file that was opened at a path; a lock ends with its process, however that ends."""
    if fcntl is None:
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise BlockingIOError(errno.EAGAIN, "another process has just finished it", str(path))


def _allocate(file: IO[bytes], size: int) -> None:
    """Take the whole space now: a disk that is too small is then known before the backbone has run for it."""
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
