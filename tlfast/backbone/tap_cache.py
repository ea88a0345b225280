"""The tap cache: what a ladder reads of a frozen backbone, kept on disk sample by sample, so that it runs once.

A folder with a manifest and shards of a few thousand samples, or fewer where samples are large.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .tap_manifest import FORMAT, claim, digest
from .tap_parts import STORAGES, Output, Part, Storage, output_of, parts_of, slots_of
from .tap_shards import Shard, ShardReader

_SHARD_SAMPLES = 4096
_SHARD_BYTES = 128 << 20  # what a killed run may have to do again
_HELD_BYTES = 32 << 20  # of the system's page cache that are this process's too


class Looked(NamedTuple):
    """One frozen forward of some samples: its padded output, and where each sample's tokens begin, by stack."""

    output: Output
    starts: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Gathered:
    """Samples as they are stored, padded with zeros: each column of a part is (slots, B, S, ...)."""

    storage: Storage
    columns: dict[Part, list[torch.Tensor]]

    def output(self) -> Output:
        """As the frozen forward gives it."""
        stacks: dict[str, dict[str, torch.Tensor]] = {}
        for part, columns in self.columns.items():
            tensors = self.storage.decode(columns, part.dtype).unbind()
            stacks.setdefault(part.stack, {}).update(zip(part.slots, tensors, strict=True))
        return output_of(stacks)


class TapCache:
    """Taps of numbered samples in a folder, which is made, or must be a cache of the same.

    identity: all that the taps depend on, as plain JSON types: "fingerprint", "precision", "tokenizer", "max_length",
        "data" and "taps". counts: tokens of each sample, by stack ("backbone", or "encoder" and "decoder").
    example: an output of the forward that is cached, which tells shapes and dtypes; widths may differ, so what it has
        in the place of taps may be made of them.
    storage: "exact", as the forward gives it, or "int8" with a scale for each token and slot.
    Raises ValueError for an unknown storage and a folder that holds anything else, saying what differs; OSError where
    it cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        counts: Mapping[str, Sequence[int]],
        example: Output,
        storage: str = "exact",
    ) -> None:
        from .. import __version__

        if storage not in STORAGES:
            raise ValueError(f"storage: {storage!r} is not available; allowed: {', '.join(map(repr, STORAGES))}")
        self.folder, self.storage = Path(folder), STORAGES[storage]
        self.parts = parts_of(slots_of(example))
        self.counts = {stack: np.asarray(tokens, dtype=np.int64) for stack, tokens in counts.items()}
        self.samples = len(next(iter(self.counts.values())))
        description = {
            "format": FORMAT,
            "tlfast": __version__,
            **identity,
            "storage": storage,
            "parts": [part.describe() for part in self.parts],
            "samples": self.samples,
            "tokens": {stack: int(tokens.sum()) for stack, tokens in self.counts.items()},
        }
        claim(self.folder, description)
        self._firsts = self._bounds()
        self.shards = self._shards(digest(description))
        self._readers: dict[int, ShardReader] = {}
        self._held = 0  # bytes that reading has mapped

    @property
    def bytes(self) -> int:
        """What all shards take on the disk."""
        return sum(shard.places.size for shard in self.shards)

    def missing(self) -> list[Shard]:
        """The shards that are not there, or not whole."""
        return [shard for shard in self.shards if not shard.is_whole()]

    def fill(
        self,
        look: Callable[[Sequence[int]], Looked],
        budget: int,
        turn: tuple[int, int] = (0, 1),
        progress: Callable[[int], Any] = lambda count: None,
    ) -> None:
        """Write the shards that are missing; what a killed process left of one is written anew.

        look: runs the backbone on some samples. budget: tokens of a batch, padding included; it has at least a sample.
        turn: (k, n) writes every n-th shard from the k-th on, where n processes fill it together.
        progress: called with how many more samples are there.
        Raises ValueError where another run is filling it, OSError for a full disk.
        """
        for number, shard in enumerate(self.shards):
            if number % turn[1] != turn[0]:
                continue
            if shard.is_whole():
                progress(shard.samples)
                continue
            try:
                self._write(number, look, budget, progress)
            except BlockingIOError as error:
                raise ValueError(f"{self.folder}: another run is filling this cache; wait until it is done") from error

    def expect(self, samples: Sequence[int]) -> None:
        """Let the system read ahead what `gather` will be asked for."""
        for reader, number in self._locate(samples):
            reader.expect(number)

    def gather(
        self, samples: Sequence[int], lengths: Mapping[str, int], starts: Mapping[str, Sequence[int]]
    ) -> Gathered:
        """The taps of some samples as a padded batch. lengths: S, by stack; starts: where each sample's tokens begin.

        Runs beside PyTorch's threads: it copies, and does so without them. Raises ValueError for a shard that is
        missing or damaged.
        """
        columns = {part: self._padded(part, len(samples), lengths[part.stack]) for part in self.parts}
        places = {part: [_rows_of(tensor) for tensor in tensors] for part, tensors in columns.items()}
        for row, (reader, number) in enumerate(self._locate(samples)):
            for part, targets in places.items():
                start, length = starts[part.stack][row], lengths[part.stack]
                for target, stored in zip(targets, reader.read(part, number), strict=True):
                    _place(target[:, row], stored, start, length)
        self._forget(sum(tensor.nbytes for tensors in columns.values() for tensor in tensors))
        return Gathered(self.storage, columns)

    def _padded(self, part: Part, batch: int, length: int) -> list[torch.Tensor]:
        shape = (len(part.slots), batch, length)
        return [torch.empty((*shape, *column.shape), dtype=column.dtype) for column in self.storage.columns(part)]

    def _locate(self, samples: Sequence[int]) -> Iterator[tuple[ShardReader, int]]:
        """Each sample's shard, opened when it is first asked for, and its number there."""
        shards = np.searchsorted(self._firsts, samples, side="right") - 1
        for index, number in zip(shards.tolist(), (np.asarray(samples) - self._firsts[shards]).tolist(), strict=True):
            if index not in self._readers:
                self._readers[index] = ShardReader(self.shards[index])
            yield self._readers[index], number

    def _forget(self, read: int) -> None:
        self._held += read
        if self._held > _HELD_BYTES:
            self._held = 0
            for reader in list(self._readers.values()):  # another thread may open one meanwhile
                reader.forget()

    def _write(
        self, index: int, look: Callable[[Sequence[int]], Looked], budget: int, progress: Callable[[int], Any]
    ) -> None:
        shard, first = self.shards[index], int(self._firsts[index])
        counts = {stack: tokens[first : first + shard.samples] for stack, tokens in self.counts.items()}
        with shard.writing() as writer:
            for numbers in _batches(np.sum(list(counts.values()), axis=0), budget):
                output, starts = look([first + number for number in numbers])
                stacks = slots_of(output.to("cpu"))
                for part in self.parts:
                    slots = [stacks[part.stack][name] for name in part.slots]
                    for row, number in enumerate(numbers):
                        start = starts[part.stack][row]
                        tokens = slice(start, start + int(counts[part.stack][number]))
                        writer.put(part, number, torch.stack([slot[row, tokens] for slot in slots]))
                progress(len(numbers))

    def _bounds(self) -> np.ndarray:
        """The first sample of each shard."""
        sizes = np.zeros(self.samples, dtype=np.int64)
        for part in self.parts:
            row = sum(column.row_bytes for column in self.storage.columns(part))
            sizes += len(part.slots) * row * self.counts[part.stack]
        firsts, taken, first = [0], 0, 0
        for sample, size in enumerate(sizes.tolist()):
            if sample > first and (taken + size > _SHARD_BYTES or sample - first == _SHARD_SAMPLES):
                first, taken = sample, 0
                firsts.append(first)
            taken += size
        return np.asarray(firsts, dtype=np.int64)

    def _shards(self, identity: str) -> list[Shard]:
        shards = []
        for index, (first, end) in enumerate(zip(self._firsts, [*self._firsts[1:], self.samples], strict=True)):
            counts = {stack: tokens[first:end] for stack, tokens in self.counts.items()}
            path = self.folder / f"taps-{index:05d}.safetensors"
            metadata = {"manifest": identity, "first_sample": str(first)}
            shards.append(Shard(path, self.parts, self.storage, counts, metadata))
        return shards


def check_space(folder: Path, needed: int) -> None:
    """ValueError where fewer bytes are free in a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: the taps need {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free there; free "
            "some, store them in int8, or pass another folder for the cache"
        )


def _batches(tokens: np.ndarray, budget: int) -> Iterator[list[int]]:
    """Samples in batches of like lengths, the longest first: what does not fit into memory shows at once."""
    order = np.argsort(-tokens, kind="stable").tolist()
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, int(tokens[order[start]])))
        yield order[start : start + count]
        start += count


def _rows_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous (slots, B, S, ...) tensor, as (slots, B, bytes of S tokens)."""
    slots, batch = tensor.shape[:2]
    size = tensor.nbytes // max(1, slots * batch)
    return tensor.view(-1).view(torch.uint8).numpy().reshape(slots, batch, size)


def _place(rows: np.ndarray, stored: np.ndarray, start: int, length: int) -> None:
    """Copy a sample's bytes, slot behind slot, into its padded rows (slots, bytes of S tokens); zeros around them."""
    size = rows.shape[1] // max(1, length)
    first, end = start * size, start * size + len(stored) // len(rows)
    rows[:, first:end] = stored.reshape(len(rows), -1)
    rows[:, :first] = 0
    rows[:, end:] = 0
