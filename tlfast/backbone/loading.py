"""From a folder to a prepared backbone: an empty model, and weights that are mapped into memory, not copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops.frozen_linear import FrozenWeight, stored_layout
from . import skeleton as empty
from .families import find_family
from .freezing import resolve_layers
from .frozen import FrozenBackbone
from .linear import FrozenEmbedding, FrozenLinear
from .prepared_folder import AGAIN, MANIFEST, WEIGHTS, identity, read_manifest
from .stack import find_stacks
from .tensor_file import dtype_name, first_not_finite, read_tensors


def load(folder: Path, taps: str | Sequence[int]) -> FrozenBackbone:
    """The backbone in a folder; see `FrozenBackbone.from_pretrained`."""
    description = read_manifest(folder)
    with _named(folder):
        model = empty.make_skeleton(description["model"], folder)
        model.config._name_or_path = description["name"]
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
        base: Any = getattr(model, "base_model", model)
        stacks = find_stacks(
            base, find_family(base), description["blocks"], lambda _name, count: resolve_layers("taps", taps, count)
        )
        _fill(model, description, _read_entries(folder, description))
    return FrozenBackbone(
        model, stacks, description["precision"], description["fingerprint"], description["weight_errors"]
    )


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Errors name the folder and the way out."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        raise ValueError(text if text.startswith((str(folder), "taps:")) else f"{folder}: {text}") from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder / MANIFEST}: is damaged ({error!r}); {AGAIN}") from error


def _read_entries(folder: Path, description: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the file, checked against the manifest."""
    path, expected = folder / WEIGHTS, description["entries"]
    given, tensors = read_tensors(path)
    if given != identity(description):
        raise ValueError(f"{path}: belongs to another backbone than {MANIFEST} beside it; {AGAIN}")
    found = {name: [dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(
            f"{path}: {name} is {_shown(found.get(name))}, and {MANIFEST} says {_shown(expected.get(name))}; {AGAIN}"
        )
    free = {place for kind in ("buffers", "attributes") for place in description[kind].values()}
    wrong = first_not_finite(path, expected.keys() - free)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong} holds NaN or infinity; {AGAIN}")
    return tensors


def _shown(entry: Any) -> str:
    return "missing" if entry is None else f"{entry[0]} {tuple(entry[1])}"


def _fill(model: Any, description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Put what a file holds into an empty model; what was tied is one again."""
    made: dict[tuple[str, str], torch.Tensor] = {}
    layers: dict[str, FrozenLinear | FrozenEmbedding] = {}

    def at(place: Any) -> torch.Tensor:
        if isinstance(place, str):
            return tensors[place]
        name, first, end = place
        return tensors[name][first:end]

    for path, layer in description["layers"].items():
        parts = {name: at(place) for name, place in layer["tensors"].items()}
        key = str(layer)
        if key not in layers:
            layers[key] = _layer(path, layer, parts)
        empty.replace_layer(model, path, layers[key])
    for kind in empty.KINDS:
        for name, place in description[kind].items():
            known = kind, str(place)
            if known not in made:
                tensor = at(place)
                made[known] = nn.Parameter(tensor, requires_grad=False) if kind == "parameters" else tensor
            empty.put(model, name, kind, made[known])
    left = empty.empty_places(model)
    if left:
        raise ValueError(f"{MANIFEST} has no {left[0]}, which the configuration makes; {AGAIN}")


def _layer(path: str, layer: dict[str, Any], parts: dict[str, torch.Tensor]) -> FrozenLinear | FrozenEmbedding:
    if "padding_idx" in layer:
        values, scale = parts["values"], parts.get("scale")
        rows = tuple(values.shape[:1])
        expected = torch.bfloat16 if scale is None else torch.int8
        if values.dtype != expected or values.dim() != 2 or (scale is not None and tuple(scale.shape) != rows):
            raise ValueError(f"{path}: its tensors are not those of a table; {AGAIN}")
        return FrozenEmbedding(values, scale, layer["padding_idx"])
    bias = parts.pop("offset", None)
    if bias is not None:
        parts["bias"] = bias
    expected_parts = stored_layout(layer["precision"], layer["outputs"], layer["inputs"])
    found = {name: (x.dtype, tuple(x.shape)) for name, x in parts.items()}
    optional = {name: found.get(name, expected_parts[name]) for name in ("bias", "smooth") if name in expected_parts}
    if found | optional != expected_parts:
        raise ValueError(f"{path}: its tensors are not those of {layer['precision']}; {AGAIN}")
    stored: Any = parts
    return FrozenLinear(FrozenWeight(layer["precision"], layer["outputs"], layer["inputs"], **stored))
