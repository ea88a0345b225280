"""From a prepared backbone to a folder: which weights are written once, and a folder that is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import skeleton as empty
from .frozen import FrozenBackbone
from .gated import GatedFeedForward
from .linear import FrozenEmbedding
from .neighbours import end_to_end, memory_of
from .prepared_folder import CONFIG, FORMAT, MANIFEST, WEIGHTS, identity, is_prepared
from .sharding import is_sharded
from .tensor_file import all_finite, dtype_name, write_tensors

_FULL_DISK = f"(os error {errno.ENOSPC})"  # how tokenizers, which is written in Rust, says it, in a plain Exception


def save(
    backbone: FrozenBackbone, folder: Path, tokenizer: Any = None, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write a backbone, and the files of its tokenizer or image processor; see `FrozenBackbone.save_pretrained`."""
    from .. import __version__

    if any(is_sharded(tensor) for tensor in backbone.model.parameters()):
        raise ValueError("save_pretrained: the weights are spread over processes; save the backbone before sharding it")
    elsewhere = next((x.device for x in backbone.model.parameters() if x.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(
            f"save_pretrained: the weights are on {elsewhere}, and a folder holds them as they lie on the CPU: call "
            "backbone.cpu() before"
        )
    if backbone.config is None:
        raise ValueError(
            f"save_pretrained: {backbone.model_type} has no configuration from which it could be made again; only "
            "models of transformers can be saved"
        )
    if (folder / CONFIG).is_file() and not is_prepared(folder):
        raise ValueError(f"{folder}: holds a model that is not a prepared one; pass another folder")
    entries = _Entries()
    description = {
        "format": FORMAT,
        "tlfast": __version__,
        "precision": backbone.precision,
        "fingerprint": backbone.fingerprint(),
        "name": backbone.name,
        "blocks": None if backbone.stack.parts is not None else backbone.stack.path,
        "weight_errors": backbone._weight_errors,
        "model": empty.how_to_make(backbone.model),
        "layers": _describe_layers(backbone.model, entries),
        **_describe_tensors(backbone.model, entries),
        "entries": entries.described(),
    }
    with _staging(folder) as staging:
        _save_preprocessors(backbone, tokenizer, staging)
        write_tensors(staging / WEIGHTS, entries.tensors, identity(description), progress)
        (staging / MANIFEST).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


class _Entries:
    """The tensors of the file, by name, and where others are found in them.

    A place is an entry's name or, for a piece of one, [name, first row, end].
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._places: dict[Any, Any] = {}

    def place(self, name: str, tensor: torch.Tensor, may_be_infinite: bool = False) -> Any:
        """Where a tensor is found; the same place for the same memory."""
        key = memory_of(tensor)
        if key not in self._places:
            if not may_be_infinite and not all_finite(tensor):
                raise ValueError(f"model: {name} holds NaN or infinity; look where the model comes from")
            self.tensors[name] = tensor.detach().contiguous()
            self._places[key] = name
        return self._places[key]

    def join(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Take in tensors that lie end to end as one."""
        first = tensors[0].detach()
        shape = (sum(len(tensor) for tensor in tensors), *first.shape[1:])
        self.place(name, whole := first.as_strided(shape, first.stride()))
        row = 0
        for tensor in tensors:
            self._places[memory_of(tensor)] = [name, row, row + len(tensor)]
            row += len(tensor)
        assert row == len(whole)

    def described(self) -> dict[str, Any]:
        """{name: [dtype, shape]}."""
        return {name: [dtype_name(tensor.dtype), list(tensor.shape)] for name, tensor in self.tensors.items()}


def _describe_layers(model: nn.Module, entries: _Entries) -> dict[str, Any]:
    """The stored layers by path: their sizes, and the places of their tensors."""
    stored = {path: module for path, module in empty.walk(model) if isinstance(module, empty.Stored)}
    names = {id(x): f"{path}.{name}" for path, module in stored.items() for name, x in module.named_buffers()}
    for run in end_to_end([x for module in stored.values() for x in module.buffers()]):
        entries.join(names[id(run[0])], run)
    return {path: _describe_layer(path, module, entries) for path, module in stored.items()}


def _describe_layer(path: str, layer: empty.Stored, entries: _Entries) -> dict[str, Any]:
    if isinstance(layer, GatedFeedForward):
        parts = {"gates_and_up": layer.gates_and_up, "down": layer.down}
        described = {name: _describe_layer(f"{path}.{name}", part, entries) for name, part in parts.items()}
        return {"kind": "gated", "names": layer.names, "activation": layer.activation, **described}
    places = {name: entries.place(f"{path}.{name}", x) for name, x in layer._buffers.items() if x is not None}
    if isinstance(layer, FrozenEmbedding):
        return {"kind": "embedding", "padding_idx": layer.padding_idx, "tensors": places}
    return {
        "kind": "linear",
        "precision": layer.precision,
        "outputs": layer.out_features,
        "inputs": layer.in_features,
        "gated": layer.gated,
        "tensors": places,
    }


def _describe_tensors(model: nn.Module, entries: _Entries) -> dict[str, Any]:
    """The places of all other tensors, by kind and name."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in empty.KINDS}
    for path, module in empty.walk(model):
        if not isinstance(module, empty.Stored):
            for kind, name, tensor in empty.named_tensors(module):
                full = f"{path}.{name}".lstrip(".")
                found[kind][full] = entries.place(full, tensor, may_be_infinite=kind != "parameters")
    return found


def _save_preprocessors(backbone: FrozenBackbone, tokenizer: Any, folder: Path) -> None:
    """transformers' own files: configuration, generation settings, tokenizer."""
    backbone.config.save_pretrained(folder)
    generation = getattr(backbone.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        if not hasattr(tokenizer, "save_pretrained"):
            raise TypeError(
                f"tokenizer: got a {type(tokenizer).__name__}; pass a tokenizer or image processor of transformers"
            )
        tokenizer.save_pretrained(folder)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files are renamed into `folder` on success and removed on failure.

    The manifest goes first and comes last: without it a folder is none of a prepared backbone. Files are never written
    in place, since somebody may have mapped them. Raises OSError naming the folder.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
        try:
            yield staging
            (folder / MANIFEST).unlink(missing_ok=True)
            for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == MANIFEST):
                if (folder / entry.name).is_dir():
                    shutil.rmtree(folder / entry.name)
                os.replace(entry, folder / entry.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException as error:
        for path in created:
            with suppress(OSError):  # somebody else writes there too
                path.rmdir()
        code = errno.ENOSPC if _FULL_DISK in str(error) else getattr(error, "errno", None)
        if code is not None:
            raise OSError(code, f"{os.strerror(code)}; no backbone was saved", str(folder)) from error
        raise
