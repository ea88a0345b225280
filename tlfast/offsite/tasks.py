"""From a model to the same model with the head of a task: transformers' own classes, so that it loads by itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .architecture import base_of, find_blocks, seeded, skeleton, tensors_of
from .choices import writes

CHOICE = "multiple-choice"
TASKS = ("causal-lm", "sequence-classification", "token-classification", "image-classification", CHOICE)
WITHOUT_LABELS = ("causal-lm", CHOICE)
PROBLEMS = (None, "single_label_classification", "multi_label_classification", "regression")
_MAPPINGS = {
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    CHOICE: "MODEL_FOR_MULTIPLE_CHOICE_MAPPING",
}
_TOWERS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}  # classified by classes of the two-tower type


def with_head(
    model: nn.Module,
    task: str,
    num_labels: int | None = None,
    problem_type: str | None = None,
    pad_token_id: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """The model with the head of a task, a copy in eval mode; the head's weights are drawn from the seed.

    model: a transformers model. For "causal-lm" it must have its head, which is kept; a language model keeps its head
        for "multiple-choice" too, other models get one that scores an answer. pad_token_id: taken where the
    model's configuration has none. Raises ValueError where transformers has no such class for the model, or the
    model no such token.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not available; allowed: {', '.join(map(repr, TASKS))}")
    config = _config_of_task(model, task, num_labels, problem_type, pad_token_id)
    if task == "causal-lm" or (task == CHOICE and writes(model)):
        return _language_model(model, config)
    if task not in WITHOUT_LABELS and (num_labels is None or num_labels < 1):
        raise ValueError(f"num_labels: got {num_labels!r}; pass an integer of at least 1")
    kind = _class_for(task, config)
    try:
        find_blocks(skeleton(kind, config))  # before it takes memory: a second list of blocks may be far larger
    except ValueError as error:
        raise _unfit(task, model) from error
    with seeded(seed):
        made = kind(config)
    _copy_base(model, made)
    return made.eval()


def head_parameters(model: nn.Module, task: str) -> list[str]:
    """Names of the parameters of a head that is trained; none for a language model.

    A pooler counts as one: it is between the last block and the classifier.
    """
    if task in WITHOUT_LABELS and writes(model):
        return []
    inside = {id(parameter) for name, parameter in base_of(model).named_parameters() if "pooler." not in name}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in inside]


def _config_of_task(
    model: Any, task: str, num_labels: int | None, problem_type: str | None, pad_token_id: int | None
) -> Any:
    config = copy.deepcopy(model.config)
    attention = config._attn_implementation
    kind = _TOWERS.get(config.model_type)
    if task == "image-classification" and kind is not None:
        from transformers import CONFIG_MAPPING

        two_towers: Any = CONFIG_MAPPING[kind]
        config = two_towers(vision_config=config.to_dict())
        config.vision_config._attn_implementation = attention
    config._attn_implementation = attention
    if num_labels is not None and task not in WITHOUT_LABELS:
        config.num_labels = num_labels
        config.problem_type = problem_type if task == "sequence-classification" else None
    if getattr(config, "pad_token_id", None) is None and task != "image-classification":
        if pad_token_id is not None and not 0 <= pad_token_id < config.vocab_size:
            raise ValueError(
                f"pad_token_id: got {pad_token_id}, and the model has {config.vocab_size} tokens; pass one of them"
            )
        config.pad_token_id = pad_token_id
    return config


def _class_for(task: str, config: Any) -> Any:
    import transformers.models.auto.modeling_auto as auto

    mapping = getattr(auto, _MAPPINGS[task])
    try:
        found = mapping[type(config)]
    except KeyError:
        raise ValueError(
            f"task: transformers has no {task} for {config.model_type} models; pass another --task"
        ) from None
    return found[0] if isinstance(found, tuple | list) else found


def _language_model(model: Any, config: Any) -> nn.Module:
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(
            f"task: a {type(model).__name__} has no language-model head; make the bundle of a causal language model, "
            "loaded by AutoModelForCausalLM"
        )
    made = copy.deepcopy(model)
    made.config.pad_token_id = config.pad_token_id
    return made.eval()


@torch.no_grad()
def _copy_base(model: Any, made: Any) -> None:
    """The weights that both have, of the base and, where the model has the same head, of that."""
    same = type(model) is type(made) and model.config.num_labels == made.config.num_labels
    own = tensors_of(model if same else base_of(model))
    for name, tensor in tensors_of(made if same else base_of(made)).items():
        if name in own:
            tensor.copy_(own[name])
        elif "pooler." not in name:
            raise ValueError(f"model: it has no {name}, which a {type(made).__name__} reads; pass another --task")


def _unfit(task: str, model: Any) -> ValueError:
    return ValueError(
        f"task: {task} of a {model.config.model_type} takes more than one list of blocks; pass another --task"
    )
