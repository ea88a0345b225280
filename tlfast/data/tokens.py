"""Tokenised texts, batches padded as little as possible, and an order that keeps similar lengths together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .read import Examples

_PAD_MULTIPLE = 8
_POOL_BATCHES = 50


class TokenDataset(Dataset):
    """Tokenised examples: item i is a dict of lists (input_ids, attention_mask ...) and, with targets, `labels`.

    columns: name -> one entry an example. truncated: how many texts lost their end to max_length.
    """

    def __init__(self, columns: Mapping[str, list], truncated: int = 0) -> None:
        self.columns = dict(columns)
        self.truncated = truncated
        self.lengths = [len(ids) for ids in self.columns["input_ids"]]

    @classmethod
    def tokenise(
        cls, examples: Examples, tokenizer: Any, max_length: int, targets: Sequence[int | float] | None = None
    ) -> TokenDataset:
        """Tokenise texts or pairs with a transformers tokenizer, special tokens included, at most max_length tokens."""
        columns = dict(tokenizer(examples.texts, examples.pairs, truncation=False, verbose=False))
        long = [i for i, ids in enumerate(columns["input_ids"]) if len(ids) > max_length]
        if long:
            cut = examples.select(long)
            short = tokenizer(cut.texts, cut.pairs, truncation=True, max_length=max_length)
            for name, column in columns.items():
                for i, values in zip(long, short[name], strict=True):
                    column[i] = values
        if targets is not None:
            columns["labels"] = list(targets)
        return cls(columns, len(long))

    def select(self, indices: Sequence[int]) -> TokenDataset:
        """The examples at `indices`, in that order."""
        return TokenDataset({name: [column[i] for i in indices] for name, column in self.columns.items()})

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


@dataclass(frozen=True)
class PadBatch:
    """Collate items of a TokenDataset into int64 tensors (B, S), labels (B,) int64 or float32.

    S is the longest item's length rounded up to a multiple of 8, but never above max_length.
    """

    pad_token_id: int
    pad_token_type_id: int
    max_length: int

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> PadBatch:
        """Pad as the tokenizer does; ValueError for one without a padding token."""
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: it has no padding token; set tokenizer.pad_token")
        return cls(tokenizer.pad_token_id, tokenizer.pad_token_type_id, max_length)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        length = min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, max(self.max_length, longest))
        fill = {"input_ids": self.pad_token_id, "token_type_ids": self.pad_token_type_id, "attention_mask": 0}
        batch = {}
        for name in items[0]:
            values = [item[name] for item in items]
            if name != "labels":
                values = [row + [fill[name]] * (length - len(row)) for row in values]
            batch[name] = torch.tensor(values)
        return batch


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
