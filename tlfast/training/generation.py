"""Texts that a trained language model writes, greedily."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from ..data import PadBatch, TokenDataset
from .evaluation import evaluating

_BATCH = 16


def generate_ids(
    model: Any, dataset: TokenDataset, pad: PadBatch, max_new_tokens: int, tokenizer: Any
) -> list[list[int]]:
    """What the model writes for each example, in the dataset's order: at most max_new_tokens ids, ends included.

    A decoder continues the example's input, an encoder-decoder answers it.
    """
    device = next(model.parameters()).device
    pad = replace(pad, side="left") if not model.config.is_encoder_decoder else pad  # a decoder goes on at the right
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    if getattr(model.config, "eos_token_id", None) is None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    written: list[list[int]] = [[] for _ in range(len(dataset))]
    order = sorted(range(len(dataset)), key=lambda i: -dataset.lengths[i])
    with evaluating(model):
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            batch = pad([{k: v for k, v in dataset[i].items() if k != "labels"} for i in chosen])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            ids = model.generate(**batch, **settings, pad_token_id=pad.pad_token_id)
            # the start token, or the prompt
            before = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
            for i, row in zip(chosen, ids[:, before:].tolist(), strict=True):
                written[i] = row
    return written


def generate_texts(model: Any, dataset: TokenDataset, pad: PadBatch, max_new_tokens: int, tokenizer: Any) -> list[str]:
    """`generate_ids` as texts."""
    rows = generate_ids(model, dataset, pad, max_new_tokens, tokenizer)
    ends = {tokenizer.eos_token_id, pad.pad_token_id}
    return tokenizer.batch_decode([until_end(ids, ends) for ids in rows], skip_special_tokens=True)


def until_end(ids: Sequence[int], ends: Collection[int | None]) -> list[int]:
    """The ids before the first that ends a text."""
    for place, token in enumerate(ids):
        if token in ends:
            return list(ids[:place])
    return list(ids)
