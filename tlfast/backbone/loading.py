"""From a folder to a prepared backbone: an empty model, and weights that are mapped into memory, not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from .gated import GatedFeedForward
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
    layers: dict[str, empty.Stored] = {}

    def at(place: Any) -> torch.Tensor:
        if isinstance(place, str):
            return tensors[place]
        name, first, end = place
        return tensors[name][first:end]

    for path, layer in description["layers"].items():
        key = str(layer)
        if key not in layers:
            layers[key] = _layer(path, layer, at)
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


def _layer(path: str, layer: dict[str, Any], at: Callable[[Any], torch.Tensor]) -> empty.Stored:
    """A stored layer of its description; at: the tensor at a place."""
    if layer["kind"] == "gated":
        both = _linear(f"{path}.gates_and_up", layer["gates_and_up"], at, gated=True)
        down = FrozenLinear(_linear(f"{path}.down", layer["down"], at))
        return GatedFeedForward(layer["names"], both, down, layer["activation"])
    if layer["kind"] == "embedding":
        return _embedding(path, layer, at)
    return FrozenLinear(_linear(path, layer, at))


def _embedding(path: str, layer: dict[str, Any], at: Callable[[Any], torch.Tensor]) -> FrozenEmbedding:
    parts = {name: at(place) for name, place in layer["tensors"].items()}
    values, scale = parts["values"], parts.get("scale")
    expected = torch.bfloat16 if scale is None else torch.int8
    rows = values.shape[:1]
    if values.dtype != expected or values.dim() != 2 or (scale is not None and scale.shape != rows):
        raise ValueError(f"{path}: its tensors are not those of a table; {AGAIN}")
    return FrozenEmbedding(values, scale, layer["padding_idx"])


def _linear(path: str, layer: dict[str, Any], at: Callable[[Any], torch.Tensor], gated: bool = False) -> FrozenWeight:
    """What kernels read must have the shapes that they expect."""
    if layer["gated"] is not gated:
        raise ValueError(f"{path}: gated is {layer['gated']!r}, and {gated} is what its place asks for; {AGAIN}")
    parts: dict[str, Any] = {name: at(place) for name, place in layer["tensors"].items()}
    if "offset" in parts:  # as the module calls it, whose bias is another thing
        parts["bias"] = parts.pop("offset")
    expected = stored_layout(layer["precision"], layer["outputs"], layer["inputs"])
    found = {name: (x.dtype, tuple(x.shape)) for name, x in parts.items()}
    given = {name: shape for name, shape in expected.items() if name in found or name not in ("bias", "smooth")}
    if found != given:
        raise ValueError(f"{path}: its tensors are not those of {layer['precision']}; {AGAIN}")
    return FrozenWeight(layer["precision"], layer["outputs"], layer["inputs"], gated=gated, **parts)
