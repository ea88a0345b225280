"""Running text as blocks of equally many tokens."""

from __future__ import annotations

from typing import Any

from .documents import Documents
from .errors import InputError
from .tokens import TokenDataset

_FEWEST_TOKENS = 2  # one to read and one to predict


def cut_blocks(documents: Documents, tokenizer: Any, block_size: int) -> TokenDataset:
    """All documents one behind the other, an end of text behind each where the tokenizer has one, cut into blocks.

    The last block is what is left; a single token, which predicts nothing, is dropped. `labels` are the input ids.
    Raises InputError where all of it is less than two tokens.
    """
    stream: list[int] = []
    end = tokenizer.eos_token_id
    for ids in tokenizer(documents.texts, truncation=False, verbose=False)["input_ids"]:
        stream += ids
        if end is not None and ids[-1:] != [end]:
            stream.append(end)
    blocks = [stream[i : i + block_size] for i in range(0, len(stream), block_size)]
    blocks = [block for block in blocks if len(block) >= _FEWEST_TOKENS]
    if not blocks:
        raise InputError(f"{documents.path}: {len(stream)} tokens are too few to predict one from another; add text")
    masks = [[1] * len(block) for block in blocks]
    return TokenDataset({"input_ids": blocks, "attention_mask": masks, "labels": blocks})


def tokenise_prompts(documents: Documents, tokenizer: Any, max_length: int) -> TokenDataset:
    """Texts to be continued, without an end of text; one that is too long keeps its last max_length tokens."""
    end = tokenizer.eos_token_id
    rows = tokenizer(documents.texts, truncation=False, verbose=False)["input_ids"]
    rows = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in rows]
    cut = [i for i, ids in enumerate(rows) if len(ids) > max_length]
    rows = [ids[-max_length:] for ids in rows]
    return TokenDataset({"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]}, cut)
