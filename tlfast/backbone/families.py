"""The model families tlfast knows: one declarative table, and how to read a block's shape by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .parts import AttentionParts, BlockParts, BlockSpec, FeedForwardParts, Part, find_submodule

ENCODER, DECODER = "encoder", "decoder"
# transformers' names of activations, as ops.frozen_linear calls them
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class StackTable:
    """Where a model keeps one list of blocks, the norm behind it, and what a block looks like inside."""

    blocks: str
    parts: BlockParts
    final_norm: str | None = None
    causal: bool = False


@dataclass(frozen=True)
class Family:
    """Model types whose blocks are alike: their stacks, and how their configurations name things.

    stacks: one, or encoder and decoder. Names in the configuration; several are separated by "|", and a missing one
    is that feature's absence.
    """

    model_types: tuple[str, ...]
    stacks: dict[str, StackTable]
    norm: str = "layer"
    placement: str = "post"
    positions: str = "none"
    activation: str = "hidden_act|hidden_activation|activation_function|activation|dense_act_fn"
    heads: str = "num_attention_heads|encoder_attention_heads|num_heads"
    decoder_heads: str = "decoder_attention_heads"
    hidden_dropout: str = "hidden_dropout_prob|resid_pdrop|dropout|dropout_rate|mlp_dropout"
    attention_dropout: str = "attention_probs_dropout_prob|attn_pdrop|attention_dropout|dropout_rate"
    scale: float | None = None


def _attention(prefix: str, names: str, output: str, norm: str, **more: str) -> AttentionParts:
    query, key, value = (f"{prefix}.{name}" for name in names.split())
    return AttentionParts(query, key, value, f"{prefix}.{output}" if "." not in output else output, norm, **more)


_BERT_FF = FeedForwardParts("intermediate.dense", "output.dense", "output.LayerNorm")
_PROJECTIONS = "q_proj k_proj v_proj"


def _bert(names: str) -> dict[str, StackTable]:
    attention = _attention("attention.self", names, "attention.output.dense", "attention.output.LayerNorm")
    return {ENCODER: StackTable("encoder.layer", BlockParts(attention, _BERT_FF))}


def _clip(final_norm: str, causal: bool = False) -> dict[str, StackTable]:
    parts = BlockParts(
        _attention("self_attn", _PROJECTIONS, "out_proj", "layer_norm1"),
        FeedForwardParts("mlp.fc1", "mlp.fc2", "layer_norm2"),
    )
    blocks = "encoder.layers|vision_model.encoder.layers|text_model.encoder.layers"
    return {ENCODER: StackTable(blocks, parts, final_norm, causal)}


_VIT = BlockParts(
    AttentionParts(
        "attention.q_proj|attention.attention.query",
        "attention.k_proj|attention.attention.key",
        "attention.v_proj|attention.attention.value",
        "attention.o_proj|attention.output.dense",
        "layernorm_before",
    ),
    FeedForwardParts("mlp.fc1|intermediate.dense", "mlp.fc2|output.dense", "layernorm_after"),
)
_DINO = BlockParts(
    replace(_VIT.attention, norm="norm1", output_scale="layer_scale1.lambda1"),
    FeedForwardParts("mlp.fc1", "mlp.fc2", "norm2", output_scale="layer_scale2.lambda1"),
)
_BART_SELF = _attention("self_attn", _PROJECTIONS, "out_proj", "self_attn_layer_norm")
_BART_FF = FeedForwardParts("fc1", "fc2", "final_layer_norm")
_BART_CROSS = _attention("encoder_attn", _PROJECTIONS, "out_proj", "encoder_attn_layer_norm")
_LLAMA = BlockParts(
    _attention("self_attn", _PROJECTIONS, "o_proj", "input_layernorm"),
    FeedForwardParts("mlp.up_proj", "mlp.down_proj", "post_attention_layernorm", gate="mlp.gate_proj"),
)
_QWEN3 = replace(
    _LLAMA, attention=replace(_LLAMA.attention, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
)
_GEMMA2 = BlockParts(
    replace(_LLAMA.attention, output_norm="post_attention_layernorm"),
    replace(_LLAMA.feed_forward, norm="pre_feedforward_layernorm", output_norm="post_feedforward_layernorm"),
)
_GPT2 = BlockParts(
    AttentionParts("attn.c_attn[0/3]", "attn.c_attn[1/3]", "attn.c_attn[2/3]", "attn.c_proj", "ln_1"),
    FeedForwardParts("mlp.c_fc", "mlp.c_proj", "ln_2"),
)
_MODERNBERT = BlockParts(
    AttentionParts("attn.Wqkv[0/3]", "attn.Wqkv[1/3]", "attn.Wqkv[2/3]", "attn.Wo", "attn_norm"),
    FeedForwardParts("mlp.Wi[1/2]", "mlp.Wo", "mlp_norm", gate="mlp.Wi[0/2]"),
)


def _t5(feed_forward: int) -> FeedForwardParts:
    layer = f"layer.{feed_forward}"
    return FeedForwardParts(
        f"{layer}.DenseReluDense.wi|{layer}.DenseReluDense.wi_1",
        f"{layer}.DenseReluDense.wo",
        f"{layer}.layer_norm",
        gate=f"{layer}.DenseReluDense.wi_0",
    )


_T5_SELF = _attention("layer.0.SelfAttention", "q k v", "o", "layer.0.layer_norm")
_T5_CROSS = _attention("layer.1.EncDecAttention", "q k v", "o", "layer.1.layer_norm")


def _decoder_only(blocks: str, parts: BlockParts, final_norm: str) -> dict[str, StackTable]:
    return {DECODER: StackTable(blocks, parts, final_norm, causal=True)}


FAMILIES = (
    Family(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _bert("query key value")),
    Family(("deberta-v2",), _bert("query_proj key_proj value_proj")),
    Family(
        ("distilbert",),
        {
            ENCODER: StackTable(
                "transformer.layer",
                BlockParts(
                    _attention("attention", "q_lin k_lin v_lin", "out_lin", "sa_layer_norm"),
                    FeedForwardParts("ffn.lin1", "ffn.lin2", "output_layer_norm"),
                ),
            )
        },
    ),
    Family(
        ("modernbert",), {ENCODER: StackTable("layers", _MODERNBERT, "final_norm")}, placement="pre", positions="rotary"
    ),
    Family(
        ("t5",),
        {
            ENCODER: StackTable("encoder.block", BlockParts(_T5_SELF, _t5(1)), "encoder.final_layer_norm"),
            DECODER: StackTable(
                "decoder.block", BlockParts(_T5_SELF, _t5(2), _T5_CROSS), "decoder.final_layer_norm", causal=True
            ),
        },
        norm="rms",
        placement="pre",
        positions="relative",
        scale=1.0,
    ),
    Family(
        ("bart",),
        {
            ENCODER: StackTable("encoder.layers", BlockParts(_BART_SELF, _BART_FF)),
            DECODER: StackTable("decoder.layers", BlockParts(_BART_SELF, _BART_FF, _BART_CROSS), causal=True),
        },
    ),
    Family(("gpt2",), _decoder_only("h", _GPT2, "ln_f"), placement="pre"),
    Family(
        ("opt",),
        _decoder_only("decoder.layers", BlockParts(_BART_SELF, _BART_FF), "decoder.final_layer_norm"),
        placement="pre",
    ),
    Family(
        ("llama", "mistral", "qwen2"),
        _decoder_only("layers", _LLAMA, "norm"),
        norm="rms",
        placement="pre",
        positions="rotary",
    ),
    Family(("qwen3",), _decoder_only("layers", _QWEN3, "norm"), norm="rms", placement="pre", positions="rotary"),
    Family(("gemma2",), _decoder_only("layers", _GEMMA2, "norm"), norm="rms", placement="sandwich", positions="rotary"),
    Family(("vit", "deit"), {ENCODER: StackTable("layers|encoder.layer", _VIT, "layernorm")}, placement="pre"),
    Family(("dinov2",), {ENCODER: StackTable("encoder.layer|layers", _DINO, "layernorm")}, placement="pre"),
    Family(
        ("clip_vision_model", "siglip_vision_model"),
        _clip("post_layernorm|vision_model.post_layernorm"),
        placement="pre",
    ),
    Family(("clip_text_model",), _clip("final_layer_norm|text_model.final_layer_norm", True), placement="pre"),
    Family(("siglip_text_model",), _clip("final_layer_norm|text_model.final_layer_norm"), placement="pre"),
)
SUPPORTED = tuple(name for family in FAMILIES for name in family.model_types)


def find_family(model: nn.Module) -> Family | None:
    """The table's entry for a transformers model; None for a model that only the generic rule can tap."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def config_value(config: Any, names: str, default: Any = None) -> Any:
    """The first of several settings, separated by "|", that a configuration has."""
    return next((value for name in names.split("|") if (value := getattr(config, name, None)) is not None), default)


def block_spec(config: Any, family: Family, table: StackTable, block: nn.Module) -> BlockSpec:
    """Read the shape of a stack's blocks from its configuration and its first block."""
    attention, feed_forward = table.parts.attention, table.parts.feed_forward
    query, key = (Part.of(block, path) for path in (attention.query, attention.key))
    up, output = Part.of(block, feed_forward.up), Part.of(block, attention.output)
    heads = config_value(config, family.heads)
    if table.parts.cross_attention is not None:
        heads = config_value(config, family.decoder_heads, heads)
    head_dim = query.weight.shape[0] // heads
    _, norm = find_submodule(block, feed_forward.norm)
    scalar = getattr(config, "query_pre_attn_scalar", None)
    placement = family.placement
    if not getattr(config, "do_layer_norm_before", True):
        placement = "post"
    return BlockSpec(
        width=up.weight.shape[1],
        heads=heads,
        kv_heads=key.weight.shape[0] // head_dim,
        head_dim=head_dim,
        hidden=up.weight.shape[0],
        activation=config_value(config, family.activation),
        eps=getattr(norm, "eps", None) or norm.variance_epsilon,
        hidden_dropout=config_value(config, family.hidden_dropout, 0.0),
        attention_dropout=config_value(config, family.attention_dropout, 0.0),
        norm=family.norm,
        placement=placement,
        gated=gate_of(table.parts, block) is not None,
        bias=output.bias is not None,
        qkv_bias=query.bias is not None,
        qk_norm=attention.query_norm is not None,
        causal=table.causal,
        cross=table.parts.cross_attention is not None,
        positions=family.positions,
        scale=family.scale if scalar is None else scalar**-0.5,
        buckets=getattr(config, "relative_attention_num_buckets", 32),
        max_distance=getattr(config, "relative_attention_max_distance", 128),
    )


def gate_of(parts: BlockParts, block: nn.Module) -> Part | None:
    """The gate of a block's feed-forward, where it has one."""
    path = parts.feed_forward.gate
    if path is None:
        return None
    try:
        return Part.of(block, path)
    except AttributeError:  # T5 1.0 has none, T5 1.1 does
        return None
