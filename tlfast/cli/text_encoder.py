"""What turns texts into vectors, of the model that a command is given by --backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .backbone import LoadedBackbone

_BATCH = 64


def text_encoder(loaded: LoadedBackbone) -> Any:
    """list[str] -> (N, D) float32: an image-text model's own text features, else pooled hidden states as `embed` makes.

    Texts that are too long lose their end.
    """
    return _TextFeatures(loaded) if hasattr(loaded.model, "get_text_features") else _Pooled(loaded)


class _TextFeatures:
    """The text tower of CLIP, SigLIP and their like."""

    def __init__(self, loaded: LoadedBackbone) -> None:
        self._loaded = loaded
        self._model: Any = loaded.model.eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        limit = self._loaded.max_length
        parts = []
        for start in range(0, len(texts), _BATCH):
            # SigLIP was trained on texts padded to its limit; CLIP reads as far as the end token
            inputs = self._loaded.tokenizer(
                texts[start : start + _BATCH],
                padding="max_length",
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            features = self._model.get_text_features(**inputs)
            parts.append(getattr(features, "pooler_output", features).float())
        return torch.cat(parts)


class _Pooled:
    """Pooled hidden states of any text model."""

    def __init__(self, loaded: LoadedBackbone) -> None:
        from .. import features
        from ..backbone import freeze

        self._loaded = loaded
        self._extractor = features.Extractor.of(freeze(loaded.model))

    def __call__(self, texts: list[str]) -> torch.Tensor:
        from .. import features
        from ..data import Examples
        from ..features.inputs import batches

        examples = Examples(Path("texts"), texts, None, None, list(range(1, len(texts) + 1)))
        source = features.TextSource(examples, self._loaded.tokenizer, self._loaded.max_length)
        vectors = torch.empty(len(texts), self._extractor.width)
        for batch in batches(source, features.BATCH_TOKENS["cpu"]):
            vectors[batch.indices] = self._extractor(batch.inputs)
        return vectors
