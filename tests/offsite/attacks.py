"""What a stranger may do to a folder that tlfast reads: each attack changes a copy of a good one."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Attack = Callable[[Path], Any]


def resign(folder: Path, manifest: dict[str, Any] | None = None) -> None:
    """Enter the true sizes and digests of the files into the manifest, as a stranger would who knows the format."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if manifest is None else manifest
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Change the manifest."""

    def attack(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return attack


def put(*path: Any, value: Any) -> Attack:
    """Put a value at a path in the manifest."""

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return edit_manifest(change)


def edit_header(weights: str, change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Change the header of the file of tensors, and the manifest with it."""

    def attack(folder: Path) -> None:
        data = (folder / weights).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        (folder / weights).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        resign(folder)

    return attack


def edit_bytes(weights: str, change: Callable[[bytearray], Any]) -> Attack:
    """Change the bytes of the file of tensors, and the manifest with them; change may return others."""

    def attack(folder: Path) -> None:
        data = bytearray((folder / weights).read_bytes())
        changed = change(data)
        (folder / weights).write_bytes(data if changed is None else changed)
        resign(folder)

    return attack


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of the first tensor."""
    return next(entry for name, entry in header.items() if name != "__metadata__")


def rename(header: dict[str, Any], new: str) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[new] = header.pop(name)


def swap_offsets(header: dict[str, Any]) -> None:
    """Let two tensors share memory."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    same = next((a, b) for a in entries for b in entries if a is not b and a["shape"] == b["shape"])
    same[0]["data_offsets"] = list(same[1]["data_offsets"])


def set_float(value: float) -> Callable[[bytearray], None]:
    """Overwrite the last number."""

    def change(data: bytearray) -> None:
        data[-4:] = np.float32(value).tobytes()

    return change


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.path,)


def link(folder: Path, name: str) -> None:
    """Put a symbolic link to an equal file elsewhere in the place of a file."""
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    elsewhere.mkdir()
    os.replace(folder / name, elsewhere / name)
    (folder / name).symlink_to(elsewhere / name)


def attacks_on(weights: str) -> dict[str, Attack]:
    """What any folder with manifest.json and one file of tensors must withstand."""
    deep = '{"a":' * 5000 + "1" + "}" * 5000

    def write(name: str, content: bytes) -> Attack:
        return lambda folder: (folder / name).write_bytes(content)

    def bomb(name: str) -> Attack:
        return lambda folder: (folder / name).write_bytes(pickle.dumps(Bomb(str(folder.parent / "exploded"))))

    def fifo(folder: Path) -> None:
        (folder / weights).unlink()
        os.mkfifo(folder / weights)

    def directory(folder: Path) -> None:
        (folder / weights).unlink()
        (folder / weights).mkdir()

    def signed_bomb(folder: Path) -> None:
        bomb(weights)(folder)
        resign(folder)

    def twice(folder: Path) -> None:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace("{", '{"format": "other", ', 1))

    def flip(folder: Path) -> None:
        data = bytearray((folder / weights).read_bytes())
        data[-3] ^= 1
        (folder / weights).write_bytes(data)

    def no_header(folder: Path) -> None:
        edit_bytes(weights, lambda data: struct.pack("<Q", len(data)) + bytes(data[8:]))(folder)

    def of_files(change: Callable[[dict[str, Any]], Any]) -> Attack:
        return edit_manifest(lambda manifest: change(manifest["files"]))

    return {
        "tampered tensor": flip,
        "wrong hash": put("files", weights, "sha256", value="0" * 64),
        "hash that is none": put("files", weights, "sha256", value="../x"),
        "hash in capitals": put("files", weights, "sha256", value="A" * 64),
        "wrong size": put("files", weights, "bytes", value=12),
        "negative size": put("files", weights, "bytes", value=-1),
        "size that is a truth value": put("files", weights, "bytes", value=True),
        "huge size": put("files", weights, "bytes", value=1 << 60),
        "extra tensor": edit_header(
            weights, lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
        ),
        "missing tensor": edit_header(weights, lambda h: h.pop(next(name for name in h if name != "__metadata__"))),
        "renamed tensor": edit_header(weights, lambda h: rename(h, "../../etc/passwd")),
        "other shape": edit_header(weights, lambda h: first(h)["shape"].append(1)),
        "negative shape": edit_header(weights, lambda h: first(h).update(shape=[-1, -1])),
        "shape of floats": edit_header(weights, lambda h: first(h).update(shape=[float(x) for x in first(h)["shape"]])),
        "huge shape": edit_header(weights, lambda h: first(h).update(shape=[1 << 62])),
        "other dtype": edit_header(weights, lambda h: first(h).update(dtype="I32")),
        "unknown dtype": edit_header(weights, lambda h: first(h).update(dtype="O")),
        "dtype that is a list": edit_header(weights, lambda h: first(h).update(dtype=["F32"])),
        "offsets out of the file": edit_header(
            weights, lambda h: first(h).update(data_offsets=[1 << 40, (1 << 40) + 4])
        ),
        "negative offsets": edit_header(weights, lambda h: first(h).update(data_offsets=[-4, 0])),
        "offsets backwards": edit_header(weights, lambda h: first(h)["data_offsets"].reverse()),
        "one offset": edit_header(weights, lambda h: first(h)["data_offsets"].pop()),
        "shared offsets": edit_header(weights, swap_offsets),
        "entry with more": edit_header(weights, lambda h: first(h).update(strides=[1])),
        "entry that is a text": edit_header(weights, lambda h: h.update({next(n for n in h if n[0] != "_"): "x"})),
        "NaN": edit_bytes(weights, set_float(float("nan"))),
        "infinity": edit_bytes(weights, set_float(float("-inf"))),
        "bytes behind the tensors": edit_bytes(weights, lambda data: bytes(data) + b"\0" * 8),
        "hole before the tensors": edit_header(
            weights,
            lambda h: [e.update(data_offsets=[x + 4 for x in e["data_offsets"]]) for n, e in h.items() if n[0] != "_"],
        ),
        "huge header": edit_bytes(weights, lambda data: struct.pack("<Q", 1 << 62) + bytes(data[8:])),
        "header as long as the file": no_header,
        "negative header": edit_bytes(weights, lambda data: b"\xff" * 8 + bytes(data[8:])),
        "header that is no JSON": edit_bytes(weights, lambda data: bytes(data[:8]) + b"x" + bytes(data[9:])),
        "header in another encoding": edit_bytes(weights, lambda data: bytes(data[:8]) + b"\xff" + bytes(data[9:])),
        "empty tensors": edit_bytes(weights, lambda data: b"\0" * 8),
        "pickle for tensors": bomb(weights),
        "pickle for tensors, signed": signed_bomb,
        "pickle beside them": bomb("pytorch_model.bin"),
        "code beside them": write("modeling.py", b"import os"),
        "hidden file": write(".hidden", b""),
        "folder beside them": lambda folder: (folder / "more").mkdir(),
        "tensors that are a folder": directory,
        "tensors that are a pipe": fifo,
        "linked tensors": lambda folder: link(folder, weights),
        "linked manifest": lambda folder: link(folder, "manifest.json"),
        "no tensors": lambda folder: (folder / weights).unlink(),
        "no manifest": lambda folder: (folder / "manifest.json").unlink(),
        "manifest that is a pickle": bomb("manifest.json"),
        "empty manifest": write("manifest.json", b""),
        "manifest that is a list": write("manifest.json", b"[]"),
        "manifest in UTF-16": write("manifest.json", '{"format": 1}'.encode("utf-16")),
        "deep manifest": write("manifest.json", deep.encode()),
        "long manifest": write("manifest.json", b" " * (5 << 20)),
        "number of many digits": write("manifest.json", b'{"format": ' + b"1" * 10000 + b"}"),
        "repeated key": twice,
        "NaN in the manifest": put("version", value=float("nan")),
        "another format": put("format", value="pickle"),
        "another version": put("version", value=2),
        "version that is true": put("version", value=True),
        "extra field": put("auto_map", value={"AutoModel": "evil--code.Model"}),
        "missing field": edit_manifest(lambda manifest: manifest.pop("tlfast")),
        "path traversal": of_files(lambda files: files.update({"../../../etc/passwd": copy.copy(files[weights])})),
        "absolute path": of_files(lambda files: files.update({"/etc/passwd": copy.copy(files[weights])})),
        "path in the place of the tensors": of_files(
            lambda files: files.update({f"../x/{weights}": files.pop(weights)})
        ),
        "files that are a list": put("files", value=[weights]),
    }


def cut(weights: str, percent: int) -> Attack:
    """Cut the file of tensors at a share of its length; the manifest is as it was."""

    def attack(folder: Path) -> None:
        data = (folder / weights).read_bytes()
        (folder / weights).write_bytes(data[: len(data) * percent // 100])

    return attack
