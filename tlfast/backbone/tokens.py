"""How many tokens of a text a model takes."""

from __future__ import annotations

from typing import Any

_NO_LIMIT = 1 << 20
_POSITION_OFFSET = {"roberta": 2, "xlm-roberta": 2, "camembert": 2}  # positions start after the padding index


def most_tokens(config: Any, tokenizer: Any) -> int:
    """The most tokens a text may have, special ones included, for a model with this configuration; at most 2^20."""
    most = min(tokenizer.model_max_length, _NO_LIMIT)  # a tokenizer without a limit says 10^30, which it cannot take
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:  # relative positions: only the tokenizer sets a limit
        return most
    return min(most, positions - _POSITION_OFFSET.get(config.model_type, 0))
