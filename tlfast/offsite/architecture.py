"""Models of transformers as both parties build them: from a class, a configuration and a number of blocks."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..backbone.families import SUPPORTED, find_family
from ..backbone.stack import Stack, find_stacks
from ..data.errors import InputError
from .schema import refuse, setting, whole

ATTENTION = ("sdpa", "eager")  # others may be fetched from a hub, as code
MOST_BLOCKS = 1024
# Settings that size what no tensor of a bundle is compared with: a second list of blocks, and a pooler of a head that
# is made later. All other sizes are those of tensors, which the file must hold.
_MOST = {"layer": MOST_BLOCKS, "pooler": 8192}
_HOME = "transformers.models."
# what names the source of a model, is about its head's labels, or changes no number
_LEFT_OUT = {"architectures", "dtype", "torch_dtype", "id2label", "label2id", "num_labels", "problem_type"}
_LEFT_OUT |= {"transformers_version", "model_type", "auto_map", "quantization_config", "attn_implementation"}
_LEFT_OUT |= {"out_features", "out_indices", "stage_names"}  # of backbones, by the number of a block
_LEFT_OUT |= {"experts_implementation", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}
# settings that transformers reads where a configuration has them, and that are not among the defaults
_OPTIONAL = {
    "deberta-v2": {"norm_rel_ebd", "position_buckets", "share_att_key", "conv_kernel_size", "conv_act"},
    "qwen2": {"head_dim"},
    "opt": {"_remove_final_layer_norm"},
}


def find_blocks(model: Any) -> Stack:
    """The one list of blocks of a model of transformers; its path is that inside the whole model.

    Raises ValueError for other models: of no known family, with an encoder and a decoder, or not of transformers.
    """
    base = base_of(model)
    family = find_family(base)
    if family is None or not type(model).__module__.startswith(_HOME):
        raise ValueError(
            f"model: a {type(model).__name__} cannot be taken apart; pass a transformers model of one of the types "
            f"{', '.join(SUPPORTED)}"
        )
    stacks = find_stacks(base, family, None, lambda _name, count: tuple(range(count)))
    if len(stacks) != 1:
        raise ValueError(
            f"model: a {type(model).__name__} has an encoder and a decoder, and offsite-tuning takes one list of "
            "blocks; pass the encoder alone, such as T5EncoderModel"
        )
    return next(iter(stacks.values()))


def blocks_path(model: Any) -> str:
    """The path of the list of blocks inside the whole model."""
    blocks = find_blocks(model).blocks
    return next(name for name, module in model.named_modules() if module is blocks)


def base_of(model: Any) -> Any:
    """The model without its head."""
    if getattr(getattr(model, "config", None), "model_type", None) in ("clip", "siglip"):
        return getattr(model, "vision_model", model)  # CLIPForImageClassification
    return getattr(model, "base_model", model)


def describe(model: Any) -> dict[str, Any]:
    """Class, type, attention and configuration of a model, as a manifest keeps them; nothing that names its source.

    Raises ValueError where a setting cannot be sent.
    """
    config = model.config
    attention = config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(
            f"model: its attention is {attention!r}, which the other side may not have; load it with "
            'attn_implementation="sdpa"'
        )
    allowed = _settings_of(config.model_type)  # files from a hub have others, which nothing reads
    given = json.loads(config.to_json_string(use_diff=False))
    settings = {name: value for name, value in given.items() if name in allowed}
    described = {
        "class": type(model).__name__,
        "type": config.model_type,
        "attention": attention,
        "labels": config.num_labels,
        "config": settings,
    }
    try:
        check_settings(config.model_type, settings)
    except InputError as error:
        raise ValueError(f"model: its configuration cannot be sent ({error})") from error
    return described


def shortened(described: Mapping[str, Any], kept: tuple[int, ...], total: int) -> dict[str, Any]:
    """The description of the same model with `kept` of its `total` blocks; settings by block go with their blocks.

    Raises ValueError where a block computes by its number, so that it cannot move.
    """
    settings = copy.deepcopy(dict(described["config"]))
    if len(kept) < total and settings.get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "model: with scale_attn_by_inverse_layer_idx a block divides its attention by its number, and blocks "
            'cannot be left out; use emulator="svd:RANK"'
        )
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == total:
            settings[name] = [value[index] for index in kept]
    settings[_count_name(described["type"])] = len(kept)
    return {**described, "config": settings}


def count_of(described: Mapping[str, Any]) -> Any:
    """How many blocks a description says there are."""
    return described["config"].get(_count_name(described["type"]))


def check_settings(model_type: str, settings: Any) -> None:
    """Raise InputError for a setting that the type does not have, a value of another kind, or one out of all bounds."""
    place = "config"
    if not isinstance(settings, dict):
        raise refuse(place, settings, "an object")
    allowed = _settings_of(model_type)
    for name, value in settings.items():
        if name not in allowed:
            raise InputError(f"{place}: {name[:60]!r} is no setting of {model_type} that may be sent; it is refused")
        setting(value, f"{place}.{name}")
        most = min((most for part, most in _MOST.items() if part in name), default=None)
        if most is not None and type(value) is int:
            whole(0, most)(value, f"{place}.{name}")


def model_class(name: str, model_type: str) -> Any:
    """The class of transformers with that name, for models of that type; InputError where there is none."""
    import transformers

    try:
        found = getattr(transformers, name, None)
    except (ImportError, RuntimeError):  # a class of a module that cannot be imported here
        found = None
    if (
        not inspect.isclass(found)
        or not issubclass(found, transformers.PreTrainedModel)
        or not found.__module__.startswith(_HOME)
        or found.config_class is not _config_class(model_type)
    ):
        raise refuse("model.class", name, f"a class of transformers for {model_type} models")
    return found


def build(described: Mapping[str, Any], device: str = "cpu") -> Any:
    """The model of a description, in eval mode, with weights still to be filled in.

    device: "meta" takes no memory. Raises InputError where transformers cannot make it.
    """
    from transformers.initialization import no_init_weights

    kind = model_class(described["class"], described["type"])
    try:
        with no_init_weights(), torch.device(device):
            model = kind(config_of(described))
            model.tie_weights()
    except Exception as error:  # a stranger's configuration meets whatever transformers' own code and checks raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model.config: transformers makes no {kind.__name__} of it ({reason}); it is refused") from (
            error
        )
    return model.eval()


def skeleton(kind: Any, config: Any) -> Any:
    """A model of transformers without memory for its weights; the configuration is left as it is."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        return kind(copy.deepcopy(config))


def config_of(described: Mapping[str, Any]) -> Any:
    """transformers' configuration of a description."""
    config = _config_class(described["type"]).from_dict({**described["config"], "num_labels": described["labels"]})
    config._attn_implementation = described["attention"]
    return config


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent tensors by name; what is tied is there once, under its first name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into a model's own, which they must fit."""
    own = tensors_of(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, PyTorch's CPU generator starts from a seed; outside it goes on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _config_class(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING

    if model_type not in SUPPORTED:
        raise refuse("model.type", model_type, ", ".join(SUPPORTED))
    return CONFIG_MAPPING[model_type]


def _settings_of(model_type: str) -> set[str]:
    """The settings that a configuration of the type may have in a bundle."""
    names = {name for name in _config_class(model_type)().to_dict() if not name.startswith("_")}
    return names - _LEFT_OUT | _OPTIONAL.get(model_type, set())


def _count_name(model_type: str) -> str:
    """What a type calls its number of blocks."""
    return _config_class(model_type).attribute_map.get("num_hidden_layers", "num_hidden_layers")
