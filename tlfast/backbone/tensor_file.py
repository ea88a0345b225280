"""A safetensors file that is read as it lies: aligned for the kernels, mapped into memory and never copied.

safetensors' own writer puts the header at any multiple of 8 bytes and tensors behind each other by dtype; kernels then
read across cache lines, and matrix libraries round differently. Files are read by safetensors itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

ALIGNMENT = 64  # bytes: a cache line, and what PyTorch's own memory has
_CHUNK = 1 << 20  # bytes read at once where no more than that may be held
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype. Raises ValueError for one that the file cannot hold."""
    if dtype not in _NAMES:
        raise ValueError(f"a tensor is in {dtype}, which cannot be stored; allowed: {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


class Layout(NamedTuple):
    """Where the tensors of a file lie, in bytes. header: what it begins with; starts: of each tensor; size: of all."""

    header: bytes
    starts: dict[str, int]
    size: int


def layout(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]) -> Layout:
    """Place tensors, given as dtype and shape, each at a multiple of 64 bytes if the sizes of all before it allow it.

    Those whose sizes are multiples of 64 bytes come first: all weights in panels, and matrices of usual widths.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in entries.items()}
    description: dict[str, Any] = {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name in sorted(entries, key=lambda name: sizes[name] % ALIGNMENT != 0):
        starts[name], end = end, end + sizes[name]
        dtype, shape = entries[name]
        offsets = [starts[name], end]
        description[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(description, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + start for name, start in starts.items()}, len(header) + end)


def write_tensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write contiguous tensors as `layout` places them. progress is called with how many more bytes are written."""
    places = layout({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)
    with path.open("wb") as file:
        file.write(places.header)
        for name in places.starts:
            data = memoryview(_bytes(tensors[name]))
            for start in range(0, len(data), _CHUNK):
                progress(file.write(data[start : start + _CHUNK]))


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The metadata and all tensors of a file, mapped into memory: pages are read when they are first used.

    A small tensor that does not lie at a multiple of 64 bytes is copied. Raises ValueError for a missing or damaged
    file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: the file is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error
    return metadata, {name: x if x.data_ptr() % ALIGNMENT == 0 else x.clone() for name, x in tensors.items()}


def first_not_finite(path: Path, names: Iterable[str]) -> str | None:
    """The first of these tensors of a whole file in which a number is NaN or infinite; None where all are finite.

    Read in pieces beside the memory map, whose pages would stay resident.
    """
    chosen, buffer = set(names), bytearray(_CHUNK)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in sorted(chosen, key=lambda name: header[name]["data_offsets"]):
            dtype = _DTYPES[header[name]["dtype"]]
            start, end = header[name]["data_offsets"]
            if not dtype.is_floating_point:
                continue
            file.seek(8 + size + start)
            for left in range(end - start, 0, -_CHUNK):
                count = file.readinto(memoryview(buffer)[: min(left, _CHUNK)])
                if not all_finite(torch.frombuffer(buffer, dtype=dtype, count=count // dtype.itemsize)):
                    return name
    return None


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: ten times as fast as torch.isfinite, which writes a mask."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # which has no infinity, and one NaN of either sign
        return not bool((tensor.view(torch.uint8) & 127 == 127).any())
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
