"""Training on taps from a cache: datasets whose examples know where theirs are, and batches that bring them along."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from ..backbone.tap_cache import Gathered, Looked, TapCache, check_space
from ..backbone.tap_parts import DECODER, Output, slots_of
from ..data import InputError
from . import processes
from .evaluation import Collate
from .folder import writing_to
from .trainer import TaskData

# as for features: on the CPU what a block writes should stay in its cache, a GPU wants many more
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_OUTPUT = "backbone_output"  # as LadderModel's forward calls it
_KEPT = "taps"

_thread = ThreadPoolExecutor(1, thread_name_prefix="taps")


@dataclass(frozen=True)
class CacheReport:
    """What a cache took. bytes: of all shards; filled_bytes: of those that were missing; seconds: of filling them."""

    storage: str
    bytes: int
    filled_bytes: int
    seconds: float


class TapReader(NamedTuple):
    """What runs the backbone. look: a batch, with labels, to its output; identity: what that depends on, see TapCache.

    device: where the batch has to be.
    """

    look: Callable[..., Output]
    identity: Mapping[str, Any]
    device: torch.device


def on_cache(
    data: TaskData,
    folder: Path,
    reader: TapReader,
    storage: str = "exact",
    bar: Callable[[int], Callable[[int], Any]] = lambda total: lambda count: None,
) -> tuple[TaskData, CacheReport]:
    """The same data with the backbone's output for train and dev read from a cache, which is filled where it has gaps.

    folder: gets one cache each, `train` and `dev`. bar: given the number of examples, returns what is called with how
    many more have their taps.
    A LadderModel trains on the batches as on others, but that its backbone does not run. With storage "exact" it ends
    with the same weights to the last bit where the frozen forward of an example does not depend on its batch: MiniLM's
    does not, in any precision. Elsewhere a matrix product may round otherwise with the number of its rows, and under
    left padding positions, rotated or absolute, begin elsewhere.
    Raises InputError for a folder that holds other taps, a disk that is too small or full, and a damaged cache.
    """
    if reader.device.type == "cuda" and torch.cuda.device_count() > 1 and processes.count() == 1:
        raise InputError("a cache: several GPUs in one process cannot read it; start by torchrun, or show it one GPU")
    start = time.perf_counter()
    parts = {"train": data.train, "dev": data.dev}
    with _of_the_user(folder):
        caches = [_open(part, data.collate, folder / name, reader, storage) for name, part in parts.items()]
        missing = sum(shard.places.size for cache in caches for shard in cache.missing())
        check_space(folder, missing)
        processes.wait()  # all have seen the same shards missing
        progress = bar(sum(cache.samples for cache in caches) // processes.count())
        for cache, part in zip(caches, parts.values(), strict=True):
            look = _Looking(part, data.collate, reader)
            turn = processes.rank(), processes.count()
            cache.fill(look, _BATCH_TOKENS[reader.device.type], turn, progress)
        processes.wait()
    report = CacheReport(storage, sum(cache.bytes for cache in caches), missing, time.perf_counter() - start)
    train, dev = (CachedDataset(part, cache) for part, cache in zip(parts.values(), caches, strict=True))
    return replace(data, train=train, dev=dev, collate=CachedCollate(data.collate, folder)), report


class Kept(NamedTuple):
    """Where the taps of an example are."""

    cache: TapCache
    sample: int


class CachedDataset(Dataset):
    """Examples without what only a backbone reads; item i says beside masks and targets where its taps are.

    samples: the numbers of the examples in the cache; None: those in the dataset.
    """

    def __init__(self, dataset: Any, cache: TapCache, samples: Sequence[int] | None = None) -> None:
        self.dataset, self.cache = dataset, cache
        self.samples = range(len(dataset)) if samples is None else samples
        self.lengths, self.labels, self.truncated = dataset.lengths, dataset.labels, dataset.truncated

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset.beside_taps(index) | {_KEPT: Kept(self.cache, self.samples[index])}

    def select(self, indices: Sequence[int]) -> CachedDataset:
        """The examples at `indices`, in that order."""
        return CachedDataset(self.dataset.select(indices), self.cache, [self.samples[i] for i in indices])


class Coming:
    """A batch's taps, which a thread reads while the model still computes the batch before: `to` waits for them."""

    def __init__(self, future: Future[Gathered], folder: Path) -> None:
        self._future, self._folder = future, folder

    def to(self, device: Any, non_blocking: bool = False) -> Output:
        """The backbone's output, on a device."""
        with _of_the_user(self._folder):
            return self._future.result().output().to(device, non_blocking)


class CachedCollate:
    """Makes a batch of examples, and has the taps of those that are in a cache read for it."""

    def __init__(self, collate: Collate, folder: Path) -> None:
        self.collate, self.folder = collate, folder

    def __getattr__(self, name: str) -> Any:
        """What it fills with and on which side, which those ask for who generate."""
        if name == "collate":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if _KEPT not in items[0]:
            return self.collate(items)
        cache, samples = items[0][_KEPT].cache, [item[_KEPT].sample for item in items]
        batch: dict[str, Any] = self.collate(
            [{name: value for name, value in item.items() if name != _KEPT} for item in items]
        )
        lengths = {stack: _length(stack, batch, int(counts[samples[0]])) for stack, counts in cache.counts.items()}
        starts = {stack: _starts(stack, batch, len(samples)) for stack in cache.counts}
        with _of_the_user(self.folder):
            cache.expect(samples)
        return batch | {_OUTPUT: Coming(_thread.submit(cache.gather, samples, lengths, starts), self.folder)}


class _Looking:
    """Runs the backbone on examples of a dataset by their numbers."""

    def __init__(self, dataset: Any, collate: Collate, reader: TapReader) -> None:
        self.dataset, self.collate, self.reader = dataset, collate, reader

    def __call__(self, samples: Sequence[int]) -> Looked:
        batch = self.collate([self.dataset[sample] for sample in samples])
        output = self.reader.look(**{name: tensor.to(self.reader.device) for name, tensor in batch.items()})
        return Looked(output, {stack: _starts(stack, batch, len(samples)) for stack in slots_of(output)})


def _open(dataset: Any, collate: Collate, folder: Path, reader: TapReader, storage: str) -> TapCache:
    """The cache of a dataset; its longest example is run once, to see what the backbone gives."""
    lengths = dataset.lengths
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    example = _Looking(dataset, collate, reader)([longest]).output
    counts: dict[str, Sequence[int]] = {}
    for stack, slots in slots_of(example).items():
        if stack == DECODER:
            counts[stack] = [len(ids) for ids in dataset.labels]
        elif "attention_mask" in dataset.beside_taps(longest):
            counts[stack] = lengths
        else:  # images, which are all as large
            counts[stack] = [slots["embedding"].shape[1]] * len(lengths)
    return TapCache(folder, {**reader.identity, "data": dataset.digest()}, counts, example, storage)


def _starts(stack: str, batch: Mapping[str, torch.Tensor], size: int) -> list[int]:
    """Where the tokens of each example begin in a padded batch."""
    if stack == DECODER or "attention_mask" not in batch:
        return [0] * size
    mask = batch["attention_mask"]
    return mask.argmax(dim=1).tolist() if mask.shape[1] else [0] * size


def _length(stack: str, batch: Mapping[str, torch.Tensor], tokens: int) -> int:
    """S of a padded batch. tokens: of an example, where it is not padded."""
    if stack == DECODER:
        return batch["labels"].shape[1]
    return batch["attention_mask"].shape[1] if "attention_mask" in batch else tokens


@contextmanager
def _of_the_user(folder: Path) -> Iterator[None]:
    """Around a cache: what it refuses is for the user to mend."""
    with writing_to(folder):
        try:
            yield
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error
