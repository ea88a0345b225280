"""Pairs of source and target texts, as token ids."""

from __future__ import annotations

from typing import Any

from .read import Examples
from .tokens import TokenDataset, longer_than


def tokenise_pairs(examples: Examples, tokenizer: Any, max_length: int) -> TokenDataset:
    """Tokenise texts and, where there are, their labels as target texts; each has at most max_length tokens.

    `labels` are the target's token ids. The examples of which either text lost its end are counted as cut.
    """
    sources = Examples(examples.path, examples.texts, None, None, examples.lines)
    dataset = TokenDataset.tokenise(sources, tokenizer, max_length)
    if examples.labels is None:
        return dataset
    targets = tokenizer(text_target=examples.labels, truncation=False, verbose=False)["input_ids"]
    cut = longer_than(targets, max_length)
    if cut:
        long = [examples.labels[i] for i in cut]
        short = tokenizer(text_target=long, truncation=True, max_length=max_length)["input_ids"]
        for i, ids in zip(cut, short, strict=True):
            targets[i] = ids
    return TokenDataset({**dataset.columns, "labels": targets}, sorted({*cut, *dataset.cut}))
