"""freeze(): a model whose activations are read and whose weights are never touched."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..ops.frozen_linear import why_not_fp8
from .calibration import smoothing
from .families import Family, find_family
from .frozen import FrozenBackbone
from .prepare import prepared_copy
from .stack import find_stacks

PRECISIONS = ("fp32", "bf16", "int8", "nf4", "fp8")
_TWO_TOWERS = ("clip", "siglip")


def freeze(
    model: nn.Module,
    precision: str = "fp32",
    taps: str | Sequence[int] = "all",
    calibration: Iterable | None = None,
    blocks: str | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> FrozenBackbone:
    """Freeze a model and tap its blocks.

    model: a transformers model of a known family, or any nn.Module with one longest list of equal blocks that take and
        give (B, S, D). A head for classification is not run; a language model's (AutoModelForCausalLM,
        AutoModelForSeq2SeqLM) is kept for the tasks that need it. Its parameters are shared, get requires_grad=False,
        and the model goes to eval mode, as in peft.
    precision: "fp32": the model's own float32 weights, shared and read where they are. Blocks of width 256 and more run
        over packed tokens where the machine and the family allow it, and err as PyTorch's own do; all others run as
        modules, which give the model's results to the last bit, as every block does in `through_modules()`.
        "bf16", "int8", "nf4": the linear layers of its blocks and its embeddings are stored once more in fewer bits
        (embeddings in int8 for "int8" and "nf4"), and the model that was given is left as it is and no longer needed.
        Blocks of most families then run over packed tokens. `describe()` says which do, and why not the others.
        "fp8" (float8_e4m3fn, with a scale a token and a channel; embeddings in int8) needs the model on a CUDA GPU of
        compute capability 9.0 or newer.
        Weights are laid out for the model's device: freeze it where it shall run, or move the backbone, which lays them
        out anew. The head of a language model stays in float32; where all training is under autocast in bfloat16,
        `backbone.model.lm_head.bfloat16()` stores it once as every step would round it.
    taps: "all", or indices of the blocks whose outputs are wanted; negative ones count from the end. For an
        encoder-decoder they count in each of the two.
    calibration: for "int8": batches of the model's inputs, from which the sizes of the activations' columns are read;
        None reads them from random tokens or noise.
    blocks: dotted path of the list of blocks, for a model in which the longest list is not the one to tap.
    progress: called with how many more blocks are stored, for all precisions but "fp32".
    Raises ValueError for a model without such a list, an unknown precision or block, or a precision that its device
    cannot run, and TypeError for a model in another dtype.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is not available; allowed: {', '.join(map(repr, PRECISIONS))}")
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration: only int8 is calibrated, and {precision} is not; pass None")
    if isinstance(model, FrozenBackbone):
        raise TypeError("model: is already frozen; use it as it is, or with_taps() for other blocks")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}; pass a transformers model or another nn.Module")
    _check_config(model)
    kept = model if _writes_text(model) else getattr(model, "base_model", model)
    base: Any = getattr(kept, "base_model", kept)
    family = find_family(base)
    wrong = next(((n, p.dtype) for n, p in kept.named_parameters() if p.dtype != torch.float32), None)
    if wrong is not None:
        raise TypeError(
            f"model: {wrong[0]} is {wrong[1]}, but freeze takes torch.float32 and stores it as precision says; "
            "call model.float()"
        )
    if precision == "fp8":
        _check_fp8(kept)
    stacks = find_stacks(base, family, blocks, lambda _name, count: resolve_layers("taps", taps, count))
    plain = FrozenBackbone(kept.requires_grad_(False), stacks, "fp32")
    return plain if precision == "fp32" else _prepared(plain, family, blocks, precision, calibration, progress)


def _prepared(
    plain: FrozenBackbone,
    family: Family | None,
    blocks: str | None,
    precision: str,
    calibration: Iterable | None,
    progress: Callable[[int], Any],
) -> FrozenBackbone:
    """The same backbone with its weights stored in fewer bits; its fingerprint is that of the weights it came from."""
    batches = None if calibration is None else _check_calibration(calibration)
    smooth = smoothing(plain.base, plain.stacks, batches) if precision == "int8" else {}
    kept, errors = prepared_copy(plain.model, plain.stacks, precision, smooth, progress)
    base = getattr(kept, "base_model", kept)
    stacks = find_stacks(base, family, blocks, lambda name, _count: plain.stacks[name].taps)
    return FrozenBackbone(kept, stacks, precision, plain.fingerprint(), errors)


def _check_fp8(model: nn.Module) -> None:
    device = next(model.parameters()).device
    reason = why_not_fp8(device)
    if reason is not None:
        raise ValueError(
            f"precision: 'fp8' cannot run here: {reason}; move the model to such a GPU before, or use 'int8' or 'bf16'"
        )


def _check_calibration(calibration: Iterable) -> list[dict[str, torch.Tensor]]:
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration: there is no batch in it; pass at least one, or None")
    for batch in batches:
        if not isinstance(batch, Mapping) or not all(isinstance(value, torch.Tensor) for value in batch.values()):
            raise ValueError(
                f"calibration: a batch is a {type(batch).__name__}; pass dicts of tensors as the model takes them, "
                "such as tokenizer(texts, padding=True, return_tensors='pt')"
            )
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def resolve_layers(argument: str, layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Turn "all" or a list of indices (negative from the end) into sorted block indices; ValueError if out of range."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'{argument}: {layers!r} is not allowed; pass "all" or a list of block indices')
        return tuple(range(count))
    if isinstance(layers, int) or not hasattr(layers, "__iter__"):
        raise ValueError(f'{argument}: {layers!r} is not a list; pass "all" or a list of block indices')
    layers = list(layers)
    if not layers:
        raise ValueError(f'{argument}: the list is empty; pass "all" or at least one block index')
    for index in layers:
        if not hasattr(index, "__index__") or not -count <= operator.index(index) < count:
            raise ValueError(f"{argument}: {index!r} is not a block; the model has blocks 0 to {count - 1}")
    return tuple(sorted({operator.index(index) % count for index in layers}))


def _writes_text(model: Any) -> bool:
    """Whether this is a language model with its head."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and model.get_output_embeddings() is not None


def _check_config(model: Any) -> None:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in _TWO_TOWERS:
        raise ValueError(
            f"model: a {model_type} model has two towers; pass one of them: model.vision_model or model.text_model"
        )
    family = find_family(model)
    if family is not None and "decoder" not in family.stacks and getattr(config, "is_decoder", False):
        raise ValueError("model: config.is_decoder is True; tlfast taps encoders here. Load it with is_decoder=False")
