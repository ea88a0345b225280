"""A bundle: what the owner of a model sends, as a folder of manifest, tensors and tokenizer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbone.tensor_file import write_tensors
from ..data.errors import InputError
from . import preprocessor as preprocessors
from .architecture import blocks_path, build, fill, tensors_of
from .block_map import BlockMap
from .encoding import Encoded, expected_parts
from .manifest import MANIFEST, WEIGHTS, check_manifest
from .preprocessor import TOKENIZER
from .reading import (
    HEADER_BYTES,
    MANIFEST_BYTES,
    Layout,
    digest,
    list_folder,
    parse_json,
    parse_tensors,
    read_file,
    read_listed,
    size_of,
)

# A bundle of the least rank is this many times smaller than the model in memory; one that claims more is a trap.
_GROWTH, _SLACK = 64, 64 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked and loaded.

    model: the emulator, a transformers model in eval mode. blocks: how its blocks stand for the full model's. text: the
    manifest's bytes, sha256: their digest, by which an adapter is bound to the bundle. preprocessor: tokenizer or image
    processor, or None.
    """

    manifest: Mapping[str, Any]
    text: bytes
    blocks: BlockMap
    model: nn.Module
    preprocessor: Any

    @property
    def sha256(self) -> str:
        """What identifies the bundle: the manifest lists the digests of all other files."""
        return digest(self.text)

    @classmethod
    def read(cls, folder: str | Path) -> Bundle:
        """Read a bundle, which may come from a stranger.

        Every field, name, shape, size, digest and number is checked first; only tensors, JSON and a tokenizer.json are
        read, and no code of the bundle is run. Raises InputError, with the reason, for anything that is not as tlfast
        writes it.
        """
        folder = Path(folder)
        manifest, text, blocks = read_manifest(folder)
        skeleton = build(manifest["model"], "meta")
        _check_stack(skeleton, blocks)
        stored, dense = layouts(skeleton, manifest["encodings"])
        _check_sizes(folder, manifest, stored, dense, skeleton)
        data = read_listed(folder, WEIGHTS, manifest["files"][WEIGHTS])
        tensors = _decode(parse_tensors(data, stored, folder / WEIGHTS), manifest["encodings"], dense, folder)
        preprocessor = _read_preprocessor(folder, manifest)
        model = build(manifest["model"])
        fill(model, tensors)
        return cls(manifest, text, blocks, model, preprocessor)


def read_manifest(folder: Path) -> tuple[dict[str, Any], bytes, BlockMap]:
    """A bundle's manifest, its bytes and its block map, checked; the folder holds what it lists and nothing else."""
    list_folder(folder, {MANIFEST, *(name for name in (WEIGHTS, TOKENIZER) if os.path.lexists(folder / name))})
    text = read_file(folder / MANIFEST, MANIFEST_BYTES)
    manifest = parse_json(text, folder / MANIFEST)
    try:
        blocks = check_manifest(manifest)
    except InputError as error:
        raise InputError(f"{folder / MANIFEST}: {error}") from error
    list_folder(folder, {MANIFEST, *manifest["files"]})
    return manifest, bytes(text), blocks


def write_bundle(
    folder: Path, manifest: dict[str, Any], model: nn.Module, encoded: Mapping[str, Encoded], tokenizer: bytes | None
) -> None:
    """Write tensors and tokenizer into an empty folder, and enter their digests into the manifest, which is not sealed.

    encoded: those of the model's tensors that are stored in parts.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(model).items():
        if name in encoded:
            tensors |= {f"{name}/{part}": value for part, value in encoded[name].parts.items()}
        else:
            tensors[name] = tensor.detach().contiguous()
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer)
    manifest["encodings"] = {name: value.described() for name, value in encoded.items()}
    manifest["files"] = {path.name: describe_file(path) for path in sorted(folder.iterdir())}


def describe_file(path: Path) -> dict[str, Any]:
    """The size and digest of a file, as a manifest lists them."""
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": digest(data)}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write manifest.json."""
    text = json.dumps(manifest, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def layouts(skeleton: nn.Module, encodings: Mapping[str, Any]) -> tuple[Layout, Layout]:
    """What the file of tensors must hold, and what the model has; InputError where the encodings do not fit it."""
    dense = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors_of(skeleton).items()}
    other = next((name for name, x in tensors_of(skeleton).items() if x.dtype != torch.float32), None)
    if other is not None:
        raise InputError(f"model: {other} is not float32; it is refused")
    stored = dict(dense)
    for name, encoding in encodings.items():
        if name not in dense or len(dense[name][1]) != 2:
            raise InputError(f"encodings: {name[:60]!r} is no matrix of the model; it is refused")
        try:
            parts = expected_parts(encoding["kind"], encoding["rank"], stored.pop(name)[1])
        except ValueError as error:
            raise InputError(f"encodings.{name}: {error}; it is refused") from error
        stored |= {f"{name}/{part}": layout for part, layout in parts.items()}
    return stored, dense


def _check_stack(skeleton: nn.Module, blocks: BlockMap) -> None:
    try:
        count = len(skeleton.get_submodule(blocks_path(skeleton)))  # type: ignore[arg-type]
    except (ValueError, AttributeError) as error:
        raise InputError(f"model.class: {error}") from error
    if count != len(blocks.kept):
        raise InputError(f"blocks: they are {len(blocks.kept)}, and the model has {count}; it is refused")


def _check_sizes(folder: Path, manifest: Mapping[str, Any], stored: Layout, dense: Layout, skeleton: nn.Module) -> None:
    """Before a byte of the tensors is read: that they can be what the manifest says, and fit into memory as claimed."""
    listed, least = manifest["files"][WEIGHTS]["bytes"], size_of(stored)
    if not least < listed <= least + HEADER_BYTES + 8:
        raise InputError(
            f"{folder / WEIGHTS}: is said to have {listed} bytes, and the model has {least}; it is refused"
        )
    needed = size_of(dense) + sum(x.element_size() * math.prod(x.shape) for x in skeleton.buffers())
    if needed > _GROWTH * listed + _SLACK:
        raise InputError(f"{folder}: the model would take {needed} bytes, and the file has {listed}; it is refused")


def _decode(
    tensors: Mapping[str, torch.Tensor], encodings: Mapping[str, Any], dense: Layout, folder: Path
) -> dict[str, torch.Tensor]:
    found = dict(tensors)
    for name, encoding in encodings.items():
        shape = dense[name][1]
        parts = {part: found.pop(f"{name}/{part}") for part in expected_parts(**encoding, shape=shape)}
        found[name] = Encoded(**encoding, columns=shape[1], parts=parts).value()
        if not bool(found[name].isfinite().all()):
            raise InputError(f"{folder / WEIGHTS}: {name!r} is not finite once its parts are put together; refused")
    return found


def _read_preprocessor(folder: Path, manifest: Mapping[str, Any]) -> Any:
    described = manifest["preprocessor"]
    if described is None:
        return None
    content = None
    if TOKENIZER in manifest["files"]:
        content = bytes(read_listed(folder, TOKENIZER, manifest["files"][TOKENIZER]))
    try:
        return preprocessors.load(described, content)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
