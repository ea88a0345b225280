"""Small random image-text models and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
END, LENGTH, VOCABULARY = 96, 16, 97
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": END}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}


def clip(seed: int = 0, end: int = END) -> Any:
    torch.manual_seed(seed)
    text = {**TEXT, **IDS, "eos_token_id": end}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)).eval()


def siglip(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    text = {**TEXT, "projection_size": 24}
    return hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=VISION)).eval()


MODELS = {"clip": clip, "siglip": siglip}


class Small(nn.Module):
    """An image tower that is not transformers'."""

    num_features = 10

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 10, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.convolution(pixels).mean(dim=(2, 3))


def pixels(count: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def texts(lengths: tuple[int, ...] = (5, 16, 9), seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded to 16 tokens, each with the end token last."""
    ids = torch.randint(2, END, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    ids = ids.where(mask, torch.tensor(1))
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END
    return {"input_ids": ids, "attention_mask": mask.long()}


def own_features(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers makes of pixels() and these texts, SigLIP without a mask."""
    if model.config.model_type == "siglip":
        inputs = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels()), model.get_text_features(**inputs)
    image, text = (getattr(features, "pooler_output", features) for features in found)
    return image, text
