"""The model families tlfast knows: one declarative table, and how to read a block by it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn


@dataclass(frozen=True)
class BlockParts:
    """Where a transformer block keeps its pieces, as dotted paths inside the block."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    feed_forward_norm: str


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps its embedding and its blocks, and how its configuration names things."""

    model_types: tuple[str, ...]
    embedding: str
    blocks: str
    parts: BlockParts
    activation: str = "hidden_act"
    hidden_dropout: str = "hidden_dropout_prob"
    attention_dropout: str = "attention_probs_dropout_prob"


@dataclass(frozen=True)
class BlockSpec:
    """The shape of one post-norm encoder block: everything a block of the same type but another width needs.

    width D, heads H, hidden is the width of the feed-forward, eps belongs to both LayerNorms.
    """

    width: int
    heads: int
    hidden: int
    activation: str
    eps: float
    hidden_dropout: float
    attention_dropout: float


BERT_PARTS = BlockParts(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    feed_forward_norm="output.LayerNorm",
)
DISTILBERT_PARTS = BlockParts(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    feed_forward_norm="output_layer_norm",
)

FAMILIES = (
    Family(("bert", "roberta", "xlm-roberta", "camembert"), "embeddings", "encoder.layer", BERT_PARTS),
    Family(
        ("distilbert",),
        "embeddings",
        "transformer.layer",
        DISTILBERT_PARTS,
        activation="activation",
        hidden_dropout="dropout",
        attention_dropout="attention_dropout",
    ),
)
SUPPORTED = tuple(name for family in FAMILIES for name in family.model_types)


def find_family(model: nn.Module) -> Family:
    """The table's entry for a transformers model; ValueError, with the list of families, for any other."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    given = f"model_type {model_type!r}" if model_type else f"a {type(model).__name__} without a transformers config"
    raise ValueError(
        f"model: {given} is not a family tlfast can tap; known are {', '.join(SUPPORTED)}. "
        "Pass a transformers model of one of these types"
    )


def submodule(module: nn.Module, path: str) -> Any:
    """The module at a dotted path; of the type that the table promises there."""
    return reduce(getattr, path.split("."), module)


def block_spec(model: Any, family: Family) -> BlockSpec:
    """Read the shape of a model's blocks from its configuration and its first block."""
    config, block = model.config, submodule(model, family.blocks)[0]
    up = submodule(block, family.parts.up)
    return BlockSpec(
        width=up.in_features,
        heads=config.num_attention_heads,
        hidden=up.out_features,
        activation=getattr(config, family.activation),
        eps=submodule(block, family.parts.feed_forward_norm).eps,
        hidden_dropout=getattr(config, family.hidden_dropout),
        attention_dropout=getattr(config, family.attention_dropout),
    )
