"""Small random detectors of transformers and tokenizers for them, without files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

NAMES = ["crane", "mouse"]
DEFINITIONS = [
    "large long-necked wading bird of marshes and plains in many parts of the world",
    "any of numerous small rodents typically resembling diminutive rats",
]
OWLVIT_TOKENS = 16
_TEMPLATE = "a photo of a . ; , -"
_OWLVIT_END = 199  # the highest id, as in CLIP's vocabulary


def owlvit() -> tuple[Any, Any]:
    """OWL-ViT in eval mode, and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 200, "max_position_embeddings": OWLVIT_TOKENS, "eos_token_id": _OWLVIT_END}
    config = transformers.OwlViTConfig(
        text_config=size | text, vision_config=size | {"image_size": 64, "patch_size": 16}, projection_dim=32
    )
    special = {"<pad>": 0, "<unk>": 1, "<start>": 2, "<end>": _OWLVIT_END}
    tokenizer = _tokenizer(special, first=3, start="<start>", end="<end>", most=OWLVIT_TOKENS)
    return transformers.OwlViTForObjectDetection(config).eval(), tokenizer


def grounding_dino() -> tuple[Any, Any]:
    """Grounding DINO in eval mode, and a tokenizer with the ids of BERT's for what separates classes."""
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=transformers.BertConfig(**text, intermediate_size=64),
        d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    special = {"<pad>": 0, "<unk>": 100, "<start>": 101, "<end>": 102, ".": 1012, "?": 1029}
    tokenizer = _tokenizer(special, first=200, start="<start>", end="<end>", most=256)
    return transformers.GroundingDinoForObjectDetection(config).eval(), tokenizer


def _tokenizer(special: dict[str, int], first: int, start: str, end: str, most: int) -> Any:
    """A token for each word of the classes, and for signs."""
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    said = " ".join([*NAMES, *DEFINITIONS]).replace("-", " ").split()
    words = [word for word in dict.fromkeys([*said, *_TEMPLATE.split()]) if word not in special]
    vocabulary = special | {word: first + i for i, word in enumerate(words)}
    assert len(set(vocabulary.values())) == len(vocabulary)
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.post_processor = tokenizers.processors.BertProcessing((end, special[end]), (start, special[start]))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", model_max_length=most
    )
