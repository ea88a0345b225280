"""From records to batches of similar length, made ahead of their use and the same in every run on the same data."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import Dataset

from ..data import Examples, ImageDataset, Images, PadBatch, TokenDataset, stack_batch
from ..training import file_digest

# on the CPU what a block writes should stay in its cache; a GPU wants many more, of which it has the memory
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_WINDOW = 8192  # examples that are sorted by length together: enough for even batches, few enough to hold
_IMAGE_TOKENS = 256  # what an image counts in a batch; ViT-base has 197
_AHEAD = 4
T = TypeVar("T")


class Window(NamedTuple):
    """Some examples as the model reads them. lengths: in tokens; cut: those that lost their end."""

    dataset: Dataset
    lengths: Sequence[int]
    cut: Sequence[int]


class Source(Protocol):
    """The examples of one file or folder, in its order."""

    def __len__(self) -> int: ...

    def window(self, chosen: range) -> Window:
        """Some of the examples, made ready."""

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the model reads of some of them."""


class Batch(NamedTuple):
    """indices: of its examples in the source; inputs: transformers'; cut: how many of them lost their end."""

    indices: list[int]
    inputs: dict[str, torch.Tensor]
    cut: int


@dataclass(frozen=True)
class TextSource:
    """Texts or pairs of texts. max_length: tokens an example may have, special ones included."""

    examples: Examples
    tokenizer: Any
    max_length: int

    def __len__(self) -> int:
        return len(self.examples)

    def window(self, chosen: range) -> Window:
        """Tokenise some of them."""
        dataset = TokenDataset.tokenise(self.examples.select(chosen), self.tokenizer, self.max_length)
        return Window(dataset, dataset.lengths, dataset.cut)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad token ids; InputError for a tokenizer with nothing to pad with."""
        return PadBatch.of_decoder(self.tokenizer, self.max_length, "right")(items)


@dataclass(frozen=True)
class ImageSource:
    """The images of a folder, opened as they are needed. processor: a transformers image processor."""

    images: Images
    processor: Any

    def __len__(self) -> int:
        return len(self.images)

    def window(self, chosen: range) -> Window:
        """Some of them, unopened."""
        dataset = ImageDataset(self.images.select(chosen).files, self.processor)
        return Window(dataset, [_IMAGE_TOKENS] * len(dataset), ())

    def collate(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Stack pixels."""
        return stack_batch(items)


def batches(source: Source, budget: int, start: int = 0) -> Generator[Batch, None, None]:
    """The source's examples in batches of at most `budget` tokens, padding included, or of one example.

    Windows of 8,192 examples follow each other; inside one the longest come first. start: leave out the batches with
    the first so many examples of this order. A thread of its own makes batches ahead.
    """
    return _ahead(_batches(source, budget, start), _AHEAD)


def first_inputs(source: Source, examples: int, budget: int) -> list[dict[str, torch.Tensor]]:
    """What the model reads of the source's first examples, in batches of at most `budget` tokens."""
    dataset, lengths, _ = source.window(range(min(examples, len(source))))
    return [source.collate([dataset[i] for i in part]) for part in _parts(lengths, budget)]


def identify(preprocessor: Any) -> str:
    """A hash of a tokenizer's or image processor's files, on which the batches depend."""
    with tempfile.TemporaryDirectory() as folder:
        preprocessor.save_pretrained(folder)
        return file_digest(folder)


def _batches(source: Source, budget: int, start: int) -> Iterator[Batch]:
    passed = start - start % _WINDOW
    for first in range(passed, len(source), _WINDOW):
        chosen = range(first, min(first + _WINDOW, len(source)))
        dataset, lengths, cut = source.window(chosen)
        for part in _parts(lengths, budget):
            passed += len(part)
            if passed > start:
                inputs = source.collate([dataset[i] for i in part])
                yield Batch([chosen[i] for i in part], inputs, len(set(cut).intersection(part)))


def _parts(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices, the longest first, in parts whose padded size the budget covers."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def _ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The items of an iterator that runs in another thread, `depth` of them ahead; what it raises comes through."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(cancel_futures=True)
