"""How a data owner tunes: the adapter's blocks in full, LoRA on them, or a ladder beside the emulator."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..backbone import freeze
from ..backbone.parts import linears_of
from ..data.errors import InputError
from ..ladder import LadderConfig, LadderModel
from .architecture import blocks_path, find_blocks
from .block_map import BlockMap
from .choices import choose
from .schema import fields, one_of, refuse, setting, whole
from .tasks import CHOICE, PROBLEMS, TASKS, WITHOUT_LABELS, head_parameters, with_head

METHODS = ("full", "lora", "ladder")
_LABELS, _TOKENS, _NAME = 1 << 17, 1 << 24, 256


@dataclass(frozen=True)
class TaskSpec:
    """What the full model needs to know of a task. name: one of TASKS. labels: how many, None for a language model and
    for multiple choice.

    label_names: of the classes, in their order; None where there are none. problem_type: as transformers names it.
    """

    name: str
    labels: int | None = None
    problem_type: str | None = None
    label_names: tuple[str, ...] | None = None
    pad_token_id: int | None = None

    @classmethod
    def check(cls, value: Any) -> TaskSpec:
        """Read a task from a manifest; InputError where it is none."""
        fields(value, "task", [part.name for part in dataclasses.fields(cls)])
        name = one_of(*TASKS)(value["name"], "task.name")
        if name in WITHOUT_LABELS and value["labels"] is not None:
            raise refuse("task.labels", value["labels"], f"null for {name}")
        if name not in WITHOUT_LABELS:
            whole(1, _LABELS)(value["labels"], "task.labels")
        one_of(*PROBLEMS)(value["problem_type"], "task.problem_type")
        if value["pad_token_id"] is not None:
            whole(0, _TOKENS)(value["pad_token_id"], "task.pad_token_id")
        names = value["label_names"]
        if names is not None and not (
            isinstance(names, list)
            and len(names) == value["labels"] == len(set(map(str, names)))
            and all(isinstance(label, str) and len(label) <= _NAME for label in names)
        ):
            raise refuse("task.label_names", names, f"as many different texts as labels, of at most {_NAME} characters")
        return cls(**{**value, "label_names": None if names is None else tuple(names)})


@dataclass(frozen=True)
class Method:
    """name: one of METHODS. rank, alpha: of LoRA. ladder: settings of LadderConfig; its layers are the emulator's."""

    name: str = "full"
    rank: int = 8
    alpha: int = 16
    ladder: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method: {self.name!r} is not available; allowed: {', '.join(METHODS)}")

    @classmethod
    def check(cls, value: Any) -> Method:
        """Read a method from a manifest; InputError where it is none."""
        fields(value, "method", [part.name for part in dataclasses.fields(cls)])
        one_of(*METHODS)(value["name"], "method.name")
        whole(1, 4096)(value["rank"], "method.rank")
        whole(1, 1 << 16)(value["alpha"], "method.alpha")
        known = {part.name for part in dataclasses.fields(LadderConfig)}
        if not isinstance(value["ladder"], dict) or not value["ladder"].keys() <= known:
            raise refuse("method.ladder", value["ladder"], "settings of LadderConfig")
        setting(value["ladder"], "method.ladder")
        try:
            LadderConfig(**value["ladder"])
        except (ValueError, TypeError) as error:
            raise InputError(f"method.ladder: {error}; it is refused") from error
        return cls(**value)


def tunable(model: nn.Module, blocks: BlockMap, task: TaskSpec, method: Method, seed: int = 0) -> nn.Module:
    """A model to be tuned by a method: forward takes transformers' inputs and labels, returns loss and logits.

    model: an emulator, or the full model; it is copied. Its state_dict() holds what is trained and nothing else, under
    names that are the same for the emulator and for the full model, whatever the number of blocks.
    Raises ValueError where task and model do not fit.
    """
    if method.name == "ladder":
        if task.name == CHOICE:
            raise ValueError("method: a ladder does not choose among answers; pass full or lora")
        return _ladder(model, blocks, task, method)
    made = with_head(model, task.name, task.labels, task.problem_type, task.pad_token_id, seed)
    return Adapted(made, blocks, task.name, method)


class Adapted(nn.Module):
    """A transformers model with a head, of which the adapter's blocks (or LoRA on them) and the head are trained."""

    accepts_loss_kwargs = False  # the loss is a batch's mean, whatever else Trainer counts

    def __init__(self, model: nn.Module, blocks: BlockMap, task: str, method: Method) -> None:
        super().__init__()
        model.requires_grad_(False)
        kept: Any = model.config
        kept.use_cache = False  # training keeps no keys and values
        path, count = blocks_path(model), len(find_blocks(model).blocks)
        roles = {f"{path}.{place}.": f"{blocks.role(place, count)}." for place in blocks.adapter_places(count)}
        heads = head_parameters(model, task)
        self.task = task
        self._peft: Any = None
        if method.name == "lora":
            self._peft = _with_lora(model, list(roles), method)
        self.model = model
        self.keys: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            prefix = next((prefix for prefix in roles if name.startswith(prefix)), None)
            if prefix is not None and (method.name == "full" or ".lora_" in name):
                self.keys[name] = f"blocks.{roles[prefix]}{name[len(prefix) :]}"
            elif name in heads:
                self.keys[name] = f"head.{name}"
            parameter.requires_grad_(name in self.keys)
        self.register_state_dict_post_hook(_keep_trained)
        self.register_load_state_dict_pre_hook(_to_own_names)
        self.register_load_state_dict_post_hook(_forget_frozen)

    @property
    def config(self) -> Any:
        """transformers' configuration, which Trainer asks for."""
        return self.model.config

    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
        """transformers' inputs; labels as its class takes them. Returns its loss and logits.

        For multiple choice: what `choose` takes, labels (B,) the numbers of the right answers, and their cross-entropy.
        """
        from transformers.modeling_outputs import SequenceClassifierOutput

        if self.task == CHOICE:
            scores = choose(self.model, **inputs)
            loss = None if labels is None else F.cross_entropy(scores, labels)
            return SequenceClassifierOutput(loss=loss, logits=scores)
        if labels is not None:
            inputs["labels"] = labels
        output = self.model(**inputs)
        return SequenceClassifierOutput(loss=output.loss if labels is not None else None, logits=output.logits)

    def merged(self) -> Any:
        """The transformers model, into whose weights LoRA is added; this module is of no use afterwards."""
        return self.model if self._peft is None else self._peft.merge_and_unload()


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter file holds: the trained tensors, by names that fit the full model too."""
    return {name: x.detach() for name, x in model.state_dict().items() if name != "calibrated"}


def load_trained(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the tensors of an adapter file into a model that `tunable` made for the same task and method."""
    if isinstance(model, LadderModel):
        tensors = {**tensors, "calibrated": torch.tensor(True)}
    model.load_state_dict(dict(tensors))


def _with_lora(model: Any, prefixes: list[str], method: Method) -> Any:
    """peft's wrapper of the model, whose own linear layers in these blocks have become LoRA layers."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise InputError("method: 'lora' needs the package peft; run pip install peft") from error
    linears = {id(module) for module in linears_of(model)}
    inside = tuple(prefixes)
    targets = {n: module for n, module in model.named_modules() if n.startswith(inside) and id(module) in linears}
    transposed = any(type(module).__name__ == "Conv1D" for module in targets.values())
    config = LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=list(targets), fan_in_fan_out=transposed)
    return get_peft_model(model, config)


def _ladder(model: nn.Module, blocks: BlockMap, task: TaskSpec, method: Method) -> nn.Module:
    """A ladder on the blocks that the emulator has: in the full model, on the same ones."""
    settings = dict(method.ladder)
    count = len(find_blocks(model).blocks)
    layers = settings.pop("layers", "all")
    places = list(range(len(blocks.kept))) if layers == "all" else list(layers)
    if count != len(blocks.kept):
        try:
            places = [blocks.kept[place] for place in places]
        except (IndexError, TypeError) as error:
            raise ValueError(f"method.ladder.layers: {layers!r} are no blocks of the emulator") from error
    config = LadderConfig(**settings, layers=places)
    kept = copy.deepcopy(model)
    return LadderModel(freeze(kept), task.name, task.labels, config, problem_type=task.problem_type)


def _keep_trained(module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    found = {f"{prefix}{key}": state[f"{prefix}model.{name}"] for name, key in module.keys.items()}
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update(found)


def _to_own_names(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, key in module.keys.items():
        if f"{prefix}{key}" in state:
            state[f"{prefix}model.{name}"] = state.pop(f"{prefix}{key}")


def _forget_frozen(module: Any, incompatible: Any) -> None:
    own = {f"model.{name}" for name in module.keys}
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name in own]
