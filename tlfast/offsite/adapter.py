"""An adapter: what a data owner sends back, bound to the bundle it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbone.tensor_file import write_tensors
from ..data.errors import InputError
from .block_map import BlockMap
from .bundle import Bundle, describe_file, write_manifest
from .manifest import MANIFEST, check_file, check_manifest
from .methods import Method, TaskSpec, trained
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
from .schema import fields, hexadecimal, one_of, refuse, word

FORMAT, VERSION, WEIGHTS = "tlfast offsite adapter", 1, "adapter.safetensors"
_KEYS = ("format", "version", "tlfast", "task", "method", "bundle_sha256", "bundle", "files")


@dataclass(frozen=True)
class Adapter:
    """An adapter whose manifest was checked; its tensors are read once it is known what they must be.

    bundle: the manifest of the bundle it was trained on, as its owner sealed it; bundle_sha256: that bundle's digest.
    """

    folder: Path
    manifest: Mapping[str, Any]
    task: TaskSpec
    method: Method
    bundle: Mapping[str, Any]
    bundle_sha256: str
    blocks: BlockMap

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read and check the manifest of an adapter, which may come from a stranger; InputError with the reason."""
        folder = Path(folder)
        list_folder(folder, {MANIFEST, WEIGHTS})
        found = parse_json(read_file(folder / MANIFEST, 3 * MANIFEST_BYTES), folder / MANIFEST)
        try:
            return cls._checked(folder, found)
        except InputError as error:
            raise InputError(f"{folder / MANIFEST}: {error}") from error

    @classmethod
    def _checked(cls, folder: Path, found: dict[str, Any]) -> Adapter:
        fields(found, "manifest", _KEYS)
        one_of(FORMAT)(found["format"], "format")
        if found["version"] != VERSION or type(found["version"]) is not int:
            raise InputError(
                f"version: {found['version']!r:.40} is not {VERSION}, which this tlfast reads; use another"
            )
        word(found["tlfast"], "tlfast")
        task, method = TaskSpec.check(found["task"]), Method.check(found["method"])
        for name, file in fields(found["files"], "files", [WEIGHTS]).items():
            check_file(file, f"files.{name}")
        text, expected = found["bundle"], hexadecimal(64)(found["bundle_sha256"], "bundle_sha256")
        if not isinstance(text, str):
            raise refuse("bundle", text, "the bundle's manifest as a text")
        data = text.encode("utf-8", "surrogatepass")
        if digest(data) != expected:
            raise InputError("bundle: its manifest does not have the digest that bundle_sha256 says; it is refused")
        bundle = parse_json(data, folder / MANIFEST)
        return cls(folder, found, task, method, bundle, expected, check_manifest(bundle))

    def tensors(self, expected: Layout) -> dict[str, torch.Tensor]:
        """The trained tensors, which must be exactly those expected; InputError with the reason where they are not."""
        listed, least = self.manifest["files"][WEIGHTS], size_of(expected)
        if not least < listed["bytes"] <= least + HEADER_BYTES + 8:
            raise InputError(
                f"{self.folder / WEIGHTS}: is said to have {listed['bytes']} bytes, and what was trained has {least}; "
                "it is refused"
            )
        return parse_tensors(read_listed(self.folder, WEIGHTS, listed), expected, self.folder / WEIGHTS)


def save_adapter(folder: Path, model: nn.Module, bundle: Bundle, task: TaskSpec, method: Method) -> None:
    """Write what was trained, and nothing else of model or data, into an empty folder.

    Raises ValueError where a trained number is not finite.
    """
    from .. import __version__

    tensors = {name: tensor.contiguous() for name, tensor in trained(model).items()}
    wrong = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if wrong is not None:
        raise ValueError(f"{wrong}: holds NaN or infinity; train with a lower learning rate")
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tlfast": __version__,
        "task": json.loads(json.dumps(asdict(task))),
        "method": json.loads(json.dumps(asdict(method))),
        "bundle_sha256": bundle.sha256,
        "bundle": bundle.text.decode("utf-8"),
        "files": {WEIGHTS: describe_file(folder / WEIGHTS)},
    }
    write_manifest(folder, manifest)
