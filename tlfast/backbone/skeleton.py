"""A transformers model without memory: what its configuration makes of it on the meta device, to be filled later."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .gated import GatedFeedForward
from .linear import FrozenEmbedding, FrozenLinear
from .parts import submodule

KINDS = ("parameters", "buffers", "attributes")
Stored = FrozenLinear | FrozenEmbedding | GatedFeedForward  # what takes the place of transformers' own layers
_HOME = "transformers.models."  # nothing else is imported by a name that a file gives


def how_to_make(model: Any) -> dict[str, Any]:
    """What `make_skeleton` needs beside the configuration, as JSON types.

    "absent": modules and parameters that the configuration makes and this model does not have, such as a pooler.
    Raises ValueError for a model that is not what transformers makes of its configuration.
    """
    kind = type(model)
    if not kind.__module__.startswith(_HOME):
        raise ValueError(
            f"model: {kind.__name__} is not one of transformers' own models, and cannot be made again from a "
            "configuration; freeze it anew in each process"
        )
    found = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "attention": model.config._attn_implementation,
        "transformers": _version(),
        "absent": [],
    }
    skeleton = make_skeleton(found, copy.deepcopy(model.config))
    found["absent"] = _absent(skeleton, model)
    _remove(skeleton, found["absent"])
    for path, module in walk(model):
        if not _fits(skeleton, path, module):
            raise ValueError(
                f"model: its {path or 'top'} is not what {kind.__name__} makes of the configuration, from which a "
                "saved one is made again; save a model whose structure was not changed"
            )
    return found


def make_skeleton(how: dict[str, Any], config: Any) -> Any:
    """The model that transformers makes of a configuration, all its tensors on the meta device.

    config: that of the model, or the folder in which it lies. Raises ValueError where this transformers has no such
    class, the configuration cannot be read, or no model can be made of it.
    """
    model_class = _model_class(how)
    if isinstance(config, Path):
        config = _read_config(model_class, config)
    config._attn_implementation = how["attention"]
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
        _remove(skeleton, how["absent"])
    except (ImportError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no {model_class.__name__} can be made of its configuration ({reason}); {_versions(how)}"
        ) from error
    return skeleton.eval().requires_grad_(False)


def walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all modules, under every name they have; stored layers as they are, without what is in them."""
    yield path, module
    if not isinstance(module, Stored):
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}".lstrip("."))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of every tensor a module itself holds; "attributes" are those that PyTorch does not see."""
    own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    for kind, tensors in zip(KINDS, own, strict=True):
        yield from ((kind, name, x) for name, x in tensors.items() if isinstance(x, torch.Tensor))


def put(skeleton: nn.Module, path: str, kind: str, tensor: torch.Tensor) -> None:
    """Exchange one tensor of a skeleton, or fill a place that is None there.

    Raises ValueError where there is no such place, or one of another shape.
    """
    owner, _, name = path.rpartition(".")
    try:
        module = submodule(skeleton, owner) if owner else skeleton
        before = getattr(module, name)
    except AttributeError:
        raise ValueError(f"there is no {path} in a {type(skeleton).__name__}") from None
    if before is not None and tuple(before.shape) != tuple(tensor.shape):
        raise ValueError(f"{path} is {tuple(tensor.shape)}, and the configuration makes it {tuple(before.shape)}")
    if before is None:
        vars(module).pop(name, None)  # transformers writes None where another setting makes a parameter
    if kind == "parameters":
        module.register_parameter(name, tensor)  # type: ignore[arg-type]
    elif name in module._buffers or (kind == "buffers" and before is None):
        module._buffers[name] = tensor
    else:
        setattr(module, name, tensor)


def empty_places(skeleton: nn.Module) -> list[str]:
    """Names of the tensors that are still on the meta device."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in walk(skeleton)
        for _, name, tensor in named_tensors(module)
        if tensor.is_meta
    ]


def replace_layer(skeleton: nn.Module, path: str, layer: Stored) -> None:
    """Put a stored layer in the place of a skeleton's own. Raises ValueError where that is of another kind or size."""
    owner, _, name = path.rpartition(".")
    try:
        parent = submodule(skeleton, owner) if owner else skeleton
        before = getattr(parent, name)
    except AttributeError:
        raise ValueError(f"there is no {path} in a {type(skeleton).__name__}") from None
    if not _same_size(before, layer):
        raise ValueError(f"{path} is {layer}, and the configuration makes it {before}")
    parent._modules[name] = layer


def _same_size(module: Any, layer: Stored) -> bool:
    if isinstance(layer, GatedFeedForward):
        gate, up, down = (getattr(module, name, None) for name in layer.names)
        half = layer.gates_and_up.out_features // 2, layer.gates_and_up.in_features
        return _is_linear(gate, half) and _is_linear(up, half) and _same_size(down, layer.down)
    if isinstance(layer, FrozenEmbedding):
        size = layer.num_embeddings, layer.embedding_dim
        return type(module) is nn.Embedding and tuple(module.weight.shape) == size
    return _is_linear(module, (layer.out_features, layer.in_features))


def _is_linear(module: Any, size: tuple[int, int]) -> bool:
    if type(module).__name__ == "Conv1D":  # GPT-2's lies the other way round
        return tuple(module.weight.shape) == size[::-1]
    return type(module) is nn.Linear and tuple(module.weight.shape) == size


def _fits(skeleton: Any, path: str, module: nn.Module) -> bool:
    """Whether a skeleton has a module of this kind and size at a path, or nothing that would be in the way."""
    try:
        own = submodule(skeleton, path) if path else skeleton
    except AttributeError:
        return False
    if isinstance(module, Stored):
        return _same_size(own, module)
    if type(own) is not type(module):
        return False
    for _, name, tensor in named_tensors(module):
        place = getattr(own, name, None)
        if place is not None and tuple(place.shape) != tuple(tensor.shape):
            return False
    return True


def _absent(skeleton: nn.Module, model: nn.Module) -> list[str]:
    """What a skeleton has and the model has not; of a module that is missing whole, its name alone."""
    found: list[str] = []
    stored: list[str] = []
    for path, module in skeleton.named_modules():
        if path.startswith(tuple(f"{name}." for name in (*found, *stored))):
            continue
        try:
            own = submodule(model, path) if path else model
        except AttributeError:
            own = None
        if own is None:
            found.append(path)
        elif isinstance(own, Stored):
            stored.append(path)
        else:
            names = (name for _, name, _ in named_tensors(module) if getattr(own, name, None) is None)
            found += [f"{path}.{name}".lstrip(".") for name in names]
    return found


def _remove(skeleton: nn.Module, names: list[str]) -> None:
    for path in names:
        owner, _, name = path.rpartition(".")
        parent = submodule(skeleton, owner) if owner else skeleton
        getattr(parent, name)
        if isinstance(parent, nn.ModuleList):  # a model with fewer blocks than its configuration says
            del parent._modules[name]
        else:
            setattr(parent, name, None)


def _model_class(how: dict[str, Any]) -> Any:
    module, _, name = how["class"].rpartition(".")
    try:
        if not module.startswith(_HOME):
            raise AttributeError(name)
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"transformers {_version()} has no {how['class']}; {_versions(how)}") from None


def _read_config(model_class: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():  # transformers would take its own default
        raise ValueError("its configuration cannot be read (config.json is missing)")
    try:
        return model_class.config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"its configuration cannot be read ({reason})") from error


def _version() -> str:
    import transformers

    return transformers.__version__


def _versions(how: dict[str, Any]) -> str:
    return f"it was saved with transformers {how['transformers']}, and here is {_version()}: prepare it anew"
