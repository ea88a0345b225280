"""Zero-shot detection by class embeddings: OWL-ViT asked with means of several texts."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def detect(model: Any, pixel_values: torch.Tensor, classes: torch.Tensor) -> Any:
    """What an OwlViTForObjectDetection finds of classes that are embeddings and not each a text of 16 tokens.

    So a class can be the mean of several texts: templates, or the pieces of a definition that its text encoder cannot
    take whole (`tlfast.knowledge.embed_classes`, with model.owlvit.get_text_features to encode).
    pixel_values: (B, 3, H, W). classes: (C, D), of any length.
    Returns transformers' output with logits (B, P, C) and pred_boxes (B, P, 4), P patches, as of the model itself.
    Raises TypeError for another model, ValueError for another width.

    Source: Minderer et al., "Simple Open-Vocabulary Object Detection with Vision Transformers", ECCV 2022 (arXiv
    2205.06230), section 3.
    """
    from transformers.models.owlvit.modeling_owlvit import OwlViTObjectDetectionOutput

    if not all(hasattr(model, part) for part in ("image_embedder", "class_predictor", "box_predictor")):
        raise TypeError(f"model: {type(model).__name__} has no class head to ask; pass an OwlViTForObjectDetection")
    width = model.config.text_config.hidden_size
    if classes.ndim != 2 or classes.shape[1] != width:
        raise ValueError(f"classes: {tuple(classes.shape)}; must be (C, {width}), as the model's text features are")
    feature_map, vision = model.image_embedder(pixel_values)
    patches = feature_map.flatten(1, 2)
    queries = classes.to(patches).expand(len(patches), -1, -1)
    logits, class_embeds = model.class_predictor(patches, queries)
    return OwlViTObjectDetectionOutput(
        logits=logits,
        pred_boxes=model.box_predictor(patches, feature_map),
        text_embeds=queries,
        image_embeds=feature_map,
        class_embeds=class_embeds,
        vision_model_output=vision,
    )
