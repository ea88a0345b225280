"""Small random backbones of every family, and batches for them."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 97
START, PAD, END = 0, 1, 2
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": START, "pad_token_id": PAD, "eos_token_id": END}
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
COMMON = SIZES | TOKENS | {"max_position_embeddings": 70}
GROUPED = COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # wider inside than outside
IMAGES = SIZES | {"image_size": 16, "patch_size": 4}
T5 = {"d_model": 48, "d_kv": 16, "num_heads": 3, "d_ff": 96, "num_layers": 3, "decoder_start_token_id": 0}
T5 |= {"vocab_size": VOCABULARY, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
OPT = SIZES | TOKENS | {"ffn_dim": 96, "max_position_embeddings": 70}

TEXT_ENCODERS: dict[str, hf.PreTrainedConfig] = {
    "bert": hf.BertConfig(**COMMON),
    "roberta": hf.RobertaConfig(**COMMON),
    "xlm-roberta": hf.XLMRobertaConfig(**COMMON),
    "camembert": hf.CamembertConfig(**COMMON),
    "distilbert": hf.DistilBertConfig(
        dim=48, n_layers=3, n_heads=3, hidden_dim=96, max_position_embeddings=70, **TOKENS
    ),
    "electra": hf.ElectraConfig(**COMMON, embedding_size=24),
    "deberta-v2": hf.DebertaV2Config(
        **COMMON, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", pos_att_type=["p2c", "c2p"]
    ),
    "modernbert": hf.ModernBertConfig(**COMMON, cls_token_id=START, sep_token_id=END),
    "t5-encoder": hf.T5Config(**T5),
    "clip-text": hf.CLIPTextConfig(**COMMON),
    "siglip-text": hf.SiglipTextConfig(**COMMON),
}
IMAGE_ENCODERS: dict[str, hf.PreTrainedConfig] = {
    "vit": hf.ViTConfig(**IMAGES),
    "deit": hf.DeiTConfig(**IMAGES),
    "dinov2": hf.Dinov2Config(**{**IMAGES, "mlp_ratio": 2}),
    "clip-vision": hf.CLIPVisionConfig(**IMAGES),
    "siglip-vision": hf.SiglipVisionConfig(**IMAGES),
}
DECODERS: dict[str, hf.PreTrainedConfig] = {
    "gpt2": hf.GPT2Config(n_embd=48, n_layer=3, n_head=3, n_inner=96, n_positions=70, **TOKENS),
    "opt": hf.OPTConfig(**OPT, word_embed_proj_dim=48),
    "opt-projected": hf.OPTConfig(**OPT, word_embed_proj_dim=24, do_layer_norm_before=False),
    "llama": hf.LlamaConfig(**GROUPED),
    "mistral": hf.MistralConfig(**GROUPED),
    "qwen2": hf.Qwen2Config(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED),
    "gemma2": hf.Gemma2Config(**GROUPED, query_pre_attn_scalar=12, final_logit_softcapping=3.0),
}
ENCODER_DECODERS: dict[str, hf.PreTrainedConfig] = {
    "t5": hf.T5Config(**T5),
    "t5-v1.1": hf.T5Config(**T5, num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": hf.BartConfig(
        d_model=48,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=6,
        encoder_ffn_dim=96,
        decoder_ffn_dim=48,
        max_position_embeddings=70,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        **TOKENS,
    ),
}
ENCODERS = TEXT_ENCODERS | IMAGE_ENCODERS
CONFIGS = ENCODERS | DECODERS | ENCODER_DECODERS
WITHOUT_AUTO = {"t5-encoder": hf.T5EncoderModel, "siglip-text": hf.SiglipTextModel}
# encoders whose side blocks are BERT's
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "deberta-v2")


def tiny(family: str = "bert", seed: int = 0, **settings: Any) -> Any:
    """A small random model; its weights are spread wider than at initialisation so that layers really differ.

    settings: of its configuration, other than in CONFIGS.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    for name, value in settings.items():
        setattr(config, name, value)
    model = _model(family, config)
    if family == "t5-v1.1":  # as from_pretrained makes it: transformers 5 ties every T5 at first
        model.lm_head = nn.Linear(config.d_model, VOCABULARY, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if family == "bart":  # a buffer, zero in a new model
            model.final_logits_bias.normal_()
    return model.eval()


def _model(family: str, config: hf.PreTrainedConfig) -> Any:
    if family in WITHOUT_AUTO:
        return WITHOUT_AUTO[family](config)
    loader: Any = hf.AutoModel
    if family in DECODERS:
        loader = hf.AutoModelForCausalLM
    elif family in ENCODER_DECODERS:
        loader = hf.AutoModelForSeq2SeqLM
    return loader.from_config(config)


def batch(sizes: tuple[int, ...] = (9, 5, 12), labels: int | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded random token ids with their mask; labels below `labels` if asked for."""
    generator = torch.Generator().manual_seed(seed)
    length = max(sizes, default=0)
    ids = torch.randint(END, VOCABULARY, (len(sizes), length), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor(sizes, dtype=torch.int64)[:, None]
    inputs = {"input_ids": ids.where(mask, torch.tensor(PAD)), "attention_mask": mask.long()}
    if labels is not None:
        inputs["labels"] = torch.randint(0, labels, (len(sizes),), generator=generator)
    return inputs


def inputs_of(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of three as this family's forward takes it, padded where it reads text."""
    generator = torch.Generator().manual_seed(seed)
    if family in IMAGE_ENCODERS:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    if family not in ENCODER_DECODERS:
        return batch(seed=seed)
    target = torch.randint(END, VOCABULARY, (3, 7), generator=generator)
    return batch(seed=seed) | {"decoder_input_ids": target}


def task_of(family: str) -> str:
    """A task that fits this family."""
    if family in IMAGE_ENCODERS:
        return "image-classification"
    if family in DECODERS:
        return "causal-lm"
    return "seq2seq-lm" if family in ENCODER_DECODERS else "sequence-classification"


def examples_of(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A labelled batch of three for this family's task; three classes where it is a classification."""
    inputs = inputs_of(family, seed)
    if family in DECODERS:
        return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    if family in ENCODER_DECODERS:
        labels = inputs.pop("decoder_input_ids")
        labels[1, 4:] = -100
        return inputs | {"labels": labels}
    return inputs | {"labels": torch.tensor([2, 0, 1])}


def digest(model: nn.Module) -> str:
    """A hash of every parameter and buffer, to see that training changed none."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
