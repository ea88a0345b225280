"""What a configuration says of a model: its blocks, its sizes, and the model itself without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..backbone.families import find_family
from ..backbone.freezing import resolve_layers
from ..backbone.packed_block import why_not
from ..backbone.sizes import weight_bytes
from ..backbone.skeleton import named_tensors
from ..backbone.stack import Stack, find_stacks

CLASSIFICATION = ("sequence-classification", "token-classification", "image-classification")
TASKS = (*CLASSIFICATION, "causal-lm", "seq2seq-lm")
_LOADERS = {"causal-lm": "AutoModelForCausalLM", "seq2seq-lm": "AutoModelForSeq2SeqLM"}


@dataclass(frozen=True)
class Job:
    """What is to be trained on: `batch` samples of `length` tokens, and of `target` tokens in a decoder (0: none).

    length: of an image, its patches and class tokens. labels: of a classifier.
    """

    task: str
    batch: int
    length: int
    target: int = 0
    labels: int = 2


@dataclass(frozen=True)
class Outline:
    """A model made of its configuration, its tensors in a FakeTensorMode, and its stacks of blocks by name.

    tapped: of each stack the blocks with a rung.
    """

    mode: FakeTensorMode
    model: Any
    stacks: dict[str, Stack]
    job: Job

    @property
    def base(self) -> Any:
        """The model without its head."""
        return getattr(self.model, "base_model", self.model)

    @property
    def last(self) -> Stack:
        """The only stack, or an encoder-decoder's decoder."""
        return list(self.stacks.values())[-1]

    @property
    def output_width(self) -> int:
        """The width of the last hidden state."""
        return getattr(self.model.config, "word_embed_proj_dim", None) or self.last.spec.width

    @property
    def vocabulary(self) -> int:
        """Words of the language-model head; 0 for a classifier."""
        return 0 if self.job.task in CLASSIFICATION else self.model.get_output_embeddings().weight.shape[0]

    def tokens(self, stack: Stack) -> int:
        """Tokens of a batch that a stack sees."""
        return self.job.batch * (self.job.target if stack.spec.cross else self.job.length)

    def frozen_bytes(self, precision: str) -> int:
        """What the frozen weights take."""
        return weight_bytes(self.model, self.stacks, precision)

    def tap_itemsize(self, stack: Stack, precision: str) -> int:
        """Bytes of a number of a tap: blocks over packed tokens give bfloat16, modules float32."""
        return 4 if precision == "fp32" or why_not(stack, self.base) else 2

    def inputs(self) -> dict[str, torch.Tensor]:
        """A full batch as transformers' models take it, without memory; of length tokens, none of them padding."""
        config, job = self.model.config, self.job
        with self.mode:
            if job.task == "image-classification":
                return {"pixel_values": torch.empty(job.batch, config.num_channels, *_sides(config))}
            found = {"input_ids": torch.empty(job.batch, job.length, dtype=torch.int64)}
            if job.task == "seq2seq-lm":
                found["labels"] = torch.empty(job.batch, job.target, dtype=torch.int64)
            if job.task == "causal-lm":
                found["labels"] = torch.empty(job.batch, job.length, dtype=torch.int64)
            return found


def default_task(config: Any) -> str:
    """The task a model of this configuration is most likely meant for."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq-lm"
    if not hasattr(config, "vocab_size") and hasattr(config, "image_size"):
        return "image-classification"
    of_config: Any = _Of(config)
    family = find_family(of_config)
    return "causal-lm" if family is not None and list(family.stacks) == ["decoder"] else "sequence-classification"


def outline(config: Any, job: Job, layers: Any = "all", decoder_layers: Any = None) -> Outline:
    """The model of a transformers configuration, without memory; its taps are the blocks a ladder would have.

    job.length is set for images. layers, decoder_layers: as LadderConfig has them.
    Raises ValueError for a task the model cannot do, blocks that are not there, and a length it cannot take.
    """
    if job.task not in TASKS:
        raise ValueError(f"task: {job.task!r} is not available; allowed: {', '.join(map(repr, TASKS))}")
    mode = FakeTensorMode()
    model = _model(config, job.task, mode)
    base = getattr(model, "base_model", model)

    def taps(name: str, count: int) -> tuple[int, ...]:
        decodes = name == "decoder" and decoder_layers is not None
        argument, wanted = ("decoder_layers", decoder_layers) if decodes else ("layers", layers)
        return resolve_layers(argument, wanted, count)

    stacks = find_stacks(base, find_family(base), None, taps)
    found = Outline(mode, model, stacks, job)
    _check_task(found, decoder_layers)
    return replace(found, job=_measured(found))


@contextmanager
def shortened(stacks: dict[str, Stack], counts: dict[str, int]) -> Iterator[None]:
    """While entered, each stack has so many of its first blocks only."""
    kept = {name: stack.blocks._modules for name, stack in stacks.items()}
    for name, stack in stacks.items():
        stack.blocks._modules = dict(list(kept[name].items())[: counts[name]])
    try:
        yield
    finally:
        for name, stack in stacks.items():
            stack.blocks._modules = kept[name]


def last_hidden_state(outline: Outline, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The base model's output."""
    output = outline.base(**{name: x for name, x in inputs.items() if name != "labels"})
    last = getattr(output, "last_hidden_state", None)
    return output[0] if last is None else last


@dataclass(frozen=True)
class _Of:
    """What `find_family` reads."""

    config: Any


def _model(config: Any, task: str, mode: FakeTensorMode) -> Any:
    """Made on the meta device, where transformers draws no numbers, its tensors then exchanged for fake ones."""
    import transformers

    loader = getattr(transformers, _LOADERS.get(task, "AutoModel"))
    try:
        with torch.device("meta"):
            model = loader.from_config(config, dtype=torch.float32)
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition(" Model type should be one of ")[0]
        kind = getattr(config, "model_type", type(config).__name__)
        raise ValueError(f"task: no model for {task!r} can be made of this {kind} configuration ({reason})") from error
    with mode:
        exchange(model, _without_memory)
    return model


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new


def exchange(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put other tensors in the place of a model's; one that two modules share is one afterwards, too."""
    made: dict[int, torch.Tensor] = {}
    before = []  # held until the end, so that no id is given out again
    for module in model.modules():
        for kind, name, tensor in list(named_tensors(module)):
            before.append(tensor)
            if id(tensor) not in made:
                made[id(tensor)] = make(tensor)
            if kind == "parameters":
                module._parameters[name] = made[id(tensor)]  # type: ignore[assignment]
            elif kind == "buffers":
                module._buffers[name] = made[id(tensor)]
            else:
                setattr(module, name, made[id(tensor)])


def _check_task(outline: Outline, decoder_layers: Any) -> None:
    crosses, task = outline.last.spec.cross, outline.job.task
    reads_images = getattr(outline.base, "main_input_name", None) == "pixel_values"
    reason = None
    if crosses and task != "seq2seq-lm":
        reason = "an encoder-decoder takes seq2seq-lm"
    elif task == "seq2seq-lm" and not crosses:
        reason = "it has no encoder and decoder"
    elif task == "causal-lm" and not outline.last.spec.causal:
        reason = "its positions see those behind them"
    elif reads_images != (task == "image-classification"):
        reason = "it reads images" if reads_images else "it reads text"
    if reason is not None:
        kind = outline.model.config.model_type
        raise ValueError(f"task: {task!r} does not fit this {kind} model: {reason}; pass another")
    if decoder_layers is not None and not crosses:
        raise ValueError("decoder_layers: this model has one list of blocks; choose them by layers")


def _measured(outline: Outline) -> Job:
    """The job with the number of tokens an image becomes; and a test that the model takes the length."""
    job = outline.job
    try:
        with outline.mode, torch.no_grad(), shortened(outline.stacks, dict.fromkeys(outline.stacks, 1)):
            inputs = outline.inputs()
            if "labels" in inputs:
                outline.model(**inputs)
                return job
            length = last_hidden_state(outline, inputs).shape[1]
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        kind = outline.model.config.model_type
        raise ValueError(f"length: this {kind} model does not take {job.length} tokens ({reason})") from error
    return replace(job, length=length)


def _sides(config: Any) -> tuple[int, int]:
    size = config.image_size
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)  # type: ignore[return-value]
