"""What a ladder can be trained for, and which backbones it takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..backbone import FrozenBackbone
from .losses import PROBLEMS

CLASSIFICATION = ("sequence-classification", "token-classification", "image-classification")
GENERATION = ("causal-lm", "seq2seq-lm")
TASKS = (*CLASSIFICATION, *GENERATION)

# What transformers passes to every model, and the value that says what a ladder does anyway.
_ONLY = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def check(backbone: FrozenBackbone, task: str, num_labels: int | None, problem: str | None) -> None:
    """Raise what `LadderModel` documents, where task and backbone do not fit."""
    if not isinstance(backbone, FrozenBackbone):
        raise TypeError(f"backbone: got a {type(backbone).__name__}; pass what tlfast.freeze(model) returns")
    if any(not stack.taps for stack in backbone.stacks.values()):
        raise ValueError("backbone: it has no taps, and a ladder has nothing to climb; pass one frozen with taps")
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not available; allowed: {', '.join(map(repr, TASKS))}")
    reason = _unfit(backbone, task)
    if reason is not None:
        raise ValueError(f"task: {task!r} does not fit this {backbone.model_type} backbone: {reason}")
    if task in CLASSIFICATION and (not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"num_labels: got {num_labels!r}; pass an integer of at least 1")
    if problem is not None and problem not in PROBLEMS:
        raise ValueError(f"problem_type: {problem!r} is not available; allowed: {', '.join(map(repr, PROBLEMS))}")
    if problem is not None and task != "sequence-classification":
        raise ValueError(f"problem_type: only sequence-classification has one, and the task is {task!r}; leave it out")


def check_inputs(backbone: FrozenBackbone, task: str, given: Iterable[str]) -> None:
    """TypeError for an input that nothing would read, where the table of families says what the backbone reads."""
    if backbone.stack.parts is None:
        return
    given = set(given)
    reads = getattr(backbone.base, "main_input_name", "input_ids")
    if reads == "pixel_values" and reads not in given:
        raise TypeError(f"pixel_values: missing; this {backbone.model_type} backbone reads images")
    if reads != "pixel_values" and "pixel_values" in given:
        raise TypeError(f"pixel_values: this {backbone.model_type} backbone reads text; pass input_ids")
    unread = {name for name in given if name.startswith("decoder_") or name == "encoder_outputs"}
    if unread and not backbone.is_encoder_decoder:
        raise TypeError(f"{min(unread)}: this {backbone.model_type} backbone is no encoder-decoder; leave it out")
    unread = given & {"past_key_values", "logits_to_keep"}
    if unread and task not in GENERATION:
        raise TypeError(f"{min(unread)}: a ladder for {task!r} has no use for it; leave it out")


def _unfit(backbone: FrozenBackbone, task: str) -> str | None:
    reads_images = getattr(backbone.base, "main_input_name", None) == "pixel_values"
    if task == "seq2seq-lm":
        if not backbone.is_encoder_decoder:
            return "it has no encoder and decoder; use causal-lm for a decoder, a classification task for an encoder"
        return _without_head(backbone, "AutoModelForSeq2SeqLM")
    if backbone.is_encoder_decoder:
        return "an encoder-decoder takes seq2seq-lm; for classification pass its encoder, such as T5EncoderModel"
    if task == "causal-lm":
        if not backbone.stack.spec.causal:
            return "its positions see those behind them; pass a decoder, such as GPT-2 or Llama"
        return _without_head(backbone, "AutoModelForCausalLM")
    if task == "image-classification" and not reads_images and backbone.config is not None:
        return "it does not read images; pass a vision model, such as ViT"
    if task != "image-classification" and reads_images:
        return "it reads images; use image-classification"
    return None


def _without_head(backbone: FrozenBackbone, loader: str) -> str | None:
    return None if backbone.lm_head is not None else f"it has no language-model head; load it with {loader}"


def check_others(others: dict[str, Any]) -> None:
    """TypeError for what no ladder takes, as transformers' models raise it."""
    for name, value in others.items():
        if name == "decoder_position_ids":  # transformers makes them for every encoder-decoder; T5 and BART read none
            continue
        if name not in _ONLY:
            raise TypeError(f"{name}: a ladder has no such input; it takes those of its backbone and labels")
        if value is not None and value != _ONLY[name]:
            raise TypeError(f"{name}: {value!r} is not available; leave it out, or pass {_ONLY[name]}")
