"""Reading what a stranger sent: folders, JSON and safetensors, with every claim checked and nothing executed.

Every file is opened once, without following links, and read whole; what was hashed is what is used, whatever happens to
the file afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.errors import InputError

MANIFEST_BYTES = 4 << 20  # the most a manifest may have
HEADER_BYTES = 16 << 20  # the most a safetensors header may have
DTYPES = {"F32": torch.float32, "I8": torch.int8, "U8": torch.uint8}  # all that tlfast ships
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BRACKET = re.compile(r"[\[\]{}]")
_DEPTH = 32  # JSON nested deeper is refused before Python's parser would run out of stack

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def list_folder(folder: Path, files: Collection[str]) -> None:
    """Check that a folder holds these files and nothing else: plain files, no links, no folders.

    Raises InputError naming the entry.
    """
    try:
        if stat.S_ISLNK(os.lstat(folder).st_mode):
            raise InputError(f"{folder}: is a symbolic link; pass the folder itself")
        found = {entry.name: entry for entry in os.scandir(folder)}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); pass a folder that tlfast offsite wrote") from (
            error
        )
    for name, entry in sorted(found.items()):
        if entry.is_symlink():
            raise InputError(f"{folder}: {name!r} is a symbolic link; it is refused, ask for the files themselves")
        if name not in files:
            raise InputError(f"{folder}: {name!r} does not belong there; it is refused, ask for a clean folder")
        if not entry.is_file(follow_symlinks=False):
            raise InputError(f"{folder}: {name!r} is not a plain file; it is refused")
    missing = sorted(set(files) - found.keys())
    if missing:
        raise InputError(f"{folder}: {missing[0]!r} is missing; ask for the whole folder")


def read_file(path: Path, most: int) -> bytearray:
    """The bytes of a plain file of at most `most` bytes; InputError for any other."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); ask for the whole folder") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a plain file; it is refused")
        if status.st_size > most:
            raise InputError(f"{path}: has {status.st_size} bytes, and at most {most} are expected; it is refused")
        data = bytearray(status.st_size)
        if file.readinto(data) != status.st_size or file.read(1):
            raise InputError(f"{path}: changed while it was read; try again")
    return data


def digest(data: bytes | bytearray) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_listed(folder: Path, name: str, listed: Mapping[str, Any]) -> bytearray:
    """A file whose "bytes" and "sha256" a manifest lists; InputError where it has others. It is read into memory."""
    data = read_file(folder / name, listed["bytes"])
    if len(data) != listed["bytes"]:
        raise InputError(
            f"{folder / name}: has {len(data)} bytes, and the manifest says {listed['bytes']}; the file is not "
            "whole or not the one that was sent, ask for it again"
        )
    if digest(data) != listed["sha256"]:
        raise InputError(f"{folder / name}: its SHA-256 is not the manifest's; the file was changed, ask for it again")
    return data


def parse_json(text: bytes | bytearray, path: Path) -> dict[str, Any]:
    """A JSON object without NaN, repeated keys or deep nesting; InputError for anything else."""
    try:
        decoded = bytes(text).decode("utf-8")
        _check_depth(decoded)
        found = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is not the JSON that tlfast writes ({reason}); it is refused") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not a JSON object; it is refused")
    return found


def parse_tensors(data: bytearray, expected: Layout, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that holds exactly those expected, all of them finite; they share its memory.

    Header, names, dtypes, shapes and offsets are compared with what is expected before any tensor is made.
    Raises InputError naming the first that is wrong.
    """
    start, header = _header(data, path)
    _check_names(header, expected, path)
    places = {name: _check_entry(name, header[name], *expected[name], path) for name in expected}
    end = 0
    for name, (first, last) in sorted(places.items(), key=lambda item: item[1]):
        if first != end:
            raise InputError(f"{path}: {name!r} does not begin where the tensor before it ends; it is refused")
        end = last
    if start + end != len(data):
        raise InputError(f"{path}: has {len(data)} bytes, and its header describes {start + end}; it is refused")
    tensors = {}
    for name, (first, last) in places.items():
        dtype, shape = expected[name]
        count = (last - first) // dtype.itemsize
        tensors[name] = _view(data, dtype, count, start + first).reshape(shape)
        if not _finite_tensor(tensors[name]):
            raise InputError(f"{path}: {name!r} holds NaN or infinity; it is refused")
    return tensors


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The dtype and shape of each."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def size_of(expected: Layout) -> int:
    """The bytes of the tensors of a layout."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())


def _header(data: bytearray, path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the header says of them."""
    if len(data) < 8:
        raise InputError(f"{path}: has {len(data)} bytes, which is no safetensors file; it is refused")
    size = int.from_bytes(data[:8], "little")
    if size > HEADER_BYTES or 8 + size > len(data):
        raise InputError(f"{path}: its header claims {size} bytes; this is no whole safetensors file, it is refused")
    header = parse_json(data[8 : 8 + size], path)
    header.pop("__metadata__", None)
    return 8 + size, header


def _check_names(header: Mapping[str, Any], expected: Layout, path: Path) -> None:
    missing, extra = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
    if missing:
        raise InputError(f"{path}: the tensor {missing[0]!r} is missing; it is refused")
    if extra:
        raise InputError(f"{path}: the tensor {extra[0]!r} does not belong there; it is refused")


def _check_entry(name: str, entry: Any, dtype: torch.dtype, shape: tuple[int, ...], path: Path) -> tuple[int, int]:
    """First and last offset of a tensor, after all that its header entry says was compared."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: the header's entry of {name!r} is malformed; it is refused")
    if entry["dtype"] != _NAMES[dtype]:
        raise InputError(f"{path}: {name!r} is {entry['dtype']!r}, and {_NAMES[dtype]} is expected; it is refused")
    if not _whole_numbers(entry["shape"]) or tuple(entry["shape"]) != shape:
        raise InputError(f"{path}: {name!r} is {entry['shape']!r}, and {list(shape)} is expected; it is refused")
    offsets = entry["data_offsets"]
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] < 0:
        raise InputError(f"{path}: the offsets of {name!r} are malformed; it is refused")
    if offsets[1] - offsets[0] != dtype.itemsize * math.prod(shape):
        raise InputError(f"{path}: {name!r} does not have the bytes of its shape; it is refused")
    return offsets[0], offsets[1]


def _view(data: bytearray, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
    """Numbers inside a file; copied where they lie at no multiple of their size, which some kernels need."""
    if not count:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize == 0:
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)
    return torch.frombuffer(bytearray(data[offset : offset + count * dtype.itemsize]), dtype=dtype)


def _finite_tensor(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _check_depth(text: str) -> None:
    """Brackets inside strings count too: text that has so many of them is no manifest either."""
    depth = 0
    for bracket in _BRACKET.finditer(text):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > _DEPTH:
            raise ValueError(f"nested more than {_DEPTH} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
