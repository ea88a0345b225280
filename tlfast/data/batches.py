"""From items of a dataset to batches of tensors, padded as little as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError

IGNORED = -100  # what PyTorch's and transformers' losses leave out
_PAD_MULTIPLE = 8


@dataclass(frozen=True)
class PadBatch:
    """Collate items of a TokenDataset into int64 tensors (B, S), labels (B,) int64 or float32, or (B, N) float32.

    S is the longest item's length rounded up to a multiple of 8, but never above max_length. side: where the padding
    goes. labels: "given", one value or one vector an example; "tokens", token ids or classes of tokens, which are
    padded with -100 as the inputs are, to a length of their own.
    """

    pad_token_id: int
    pad_token_type_id: int
    max_length: int
    side: str = "right"
    labels: str = "given"

    @classmethod
    def of(cls, tokenizer: Any, max_length: int, labels: str = "given") -> PadBatch:
        """Pad as the tokenizer does; ValueError for one without a padding token."""
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer: it has no padding token; set tokenizer.pad_token")
        return cls(tokenizer.pad_token_id, tokenizer.pad_token_type_id, max_length, labels=labels)

    @classmethod
    def of_decoder(cls, tokenizer: Any, max_length: int, side: str) -> PadBatch:
        """Pad for a language model, whose end of text serves where there is no padding token: it is masked anyway."""
        ids = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
        if not ids:
            raise InputError("the backbone's tokenizer has neither a padding token nor an end of text; add one of them")
        return cls(ids[0], tokenizer.pad_token_type_id, max_length, side, "tokens")

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        for name in items[0]:
            values = [item[name] for item in items]
            batch[name] = torch.tensor(self._padded(values, self._fill(name)) if self._is_padded(name) else values)
        return batch

    def _is_padded(self, name: str) -> bool:
        return name != "labels" or self.labels == "tokens"

    def _fill(self, name: str) -> int:
        return {
            "input_ids": self.pad_token_id,
            "token_type_ids": self.pad_token_type_id,
            "attention_mask": 0,
            "labels": IGNORED,
        }[name]

    def _padded(self, rows: list[list[int]], fill: int) -> list[list[int]]:
        longest = max(map(len, rows))
        length = min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, max(self.max_length, longest))
        if self.side == "left":
            return [[fill] * (length - len(row)) + row for row in rows]
        return [row + [fill] * (length - len(row)) for row in rows]


def stack_batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate items whose tensors have equal shapes, such as images; labels become (B,) int64."""
    return {
        name: torch.tensor([item[name] for item in items])
        if name == "labels"
        else torch.stack([item[name] for item in items])
        for name in items[0]
    }
