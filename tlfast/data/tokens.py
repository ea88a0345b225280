"""Tokenised texts, and an order that keeps similar lengths together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .read import Examples

_POOL_BATCHES = 50


class ColumnDataset(Dataset):
    """Tokenised examples in columns: item i is a dict of their entries and, with targets, `labels`.

    columns: name -> one entry an example. cut: the examples that lost their end to a greatest length.
    """

    def __init__(self, columns: Mapping[str, list], cut: Sequence[int] = ()) -> None:
        self.columns = dict(columns)
        self.cut = tuple(cut)
        self.lengths = [self._length(ids) for ids in self.columns["input_ids"]]

    @staticmethod
    def _length(ids: list) -> int:
        """Tokens of an example, as it is padded."""
        return len(ids)

    @property
    def labels(self) -> list:
        """The targets; KeyError without them."""
        return self.columns["labels"]

    @property
    def truncated(self) -> int:
        """How many examples lost their end."""
        return len(self.cut)

    def select(self, indices: Sequence[int]) -> Self:
        """The examples at `indices`, in that order."""
        return type(self)({name: [column[i] for i in indices] for name, column in self.columns.items()})

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


class TokenDataset(ColumnDataset):
    """Tokenised texts: item i is a dict of lists (input_ids, attention_mask ...) and, with targets, `labels`."""

    @classmethod
    def tokenise(
        cls, examples: Examples, tokenizer: Any, max_length: int, targets: Sequence[Any] | None = None
    ) -> TokenDataset:
        """Tokenise texts or pairs with a transformers tokenizer, special tokens included, at most max_length tokens."""
        columns = dict(tokenizer(examples.texts, examples.pairs, truncation=False, verbose=False))
        long = longer_than(columns["input_ids"], max_length)
        if long:
            cut = examples.select(long)
            short = tokenizer(cut.texts, cut.pairs, truncation=True, max_length=max_length)
            for name, column in columns.items():
                for i, values in zip(long, short[name], strict=True):
                    column[i] = values
        if targets is not None:
            columns["labels"] = list(targets)
        return cls(columns, long)

    def beside_taps(self, index: int) -> dict[str, Any]:
        """What a model still reads of an item when the backbone's taps for it are at hand."""
        return {name: self.columns[name][index] for name in ("attention_mask", "labels") if name in self.columns}

    def digest(self) -> str:
        """SHA-256 of all examples in their order, targets included."""
        digest = hashlib.sha256()
        for name, column in sorted(self.columns.items()):
            digest.update(f"{name}:{len(column)};".encode())
            for values in map(np.asarray, column):
                digest.update(f"{values.dtype}{values.shape}".encode())
                digest.update(values.tobytes())
        return digest.hexdigest()


def longer_than(rows: Sequence[Sequence[int]], length: int) -> list[int]:
    """The indices of the rows with more than `length` tokens."""
    return [i for i, ids in enumerate(rows) if len(ids) > length]


class LengthBuckets(Sampler[int]):
    """A shuffled order in which every batch holds items of similar length, so that little is padded.

    Shuffles, sorts pools of 50 batches by length, cuts them into batches and shuffles the batches; an incomplete
    batch comes last. The order depends on seed and epoch alone, never on the global generator, so that a run resumed
    in the middle of an epoch sees the batches it would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of that epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        complete = len(order) - len(order) % self.batch_size
        batches = []
        for start in range(0, complete, self.batch_size * _POOL_BATCHES):
            pool = order[start : min(start + self.batch_size * _POOL_BATCHES, complete)]
            pool.sort(key=lambda i: self.lengths[i])
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from order[complete:]
