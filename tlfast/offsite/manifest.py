"""What a bundle says of itself: the fields of its manifest, and how strictly they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.errors import InputError
from . import preprocessor
from .architecture import MOST_BLOCKS, check_settings, count_of
from .block_map import BlockMap
from .encoding import KINDS
from .preprocessor import TOKENIZER
from .schema import fields, hexadecimal, listed, number, one_of, refuse, whole, word

FORMAT, VERSION = "tlfast offsite bundle", 1
MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
DTYPE = "float32"
MOST_LABELS, _MOST_BYTES = 1 << 17, 1 << 44
_KEYS = {"format", "version", "tlfast", "transformers", "model", "dtype", "blocks", "emulator", "encodings"}
_KEYS |= {"preprocessor", "files", "nonce", "seal"}
_MODEL = ("class", "type", "attention", "labels", "config")
_DISTILLED = ("steps", "learning_rate", "kd_weight", "lm_weight", "seed")


def check_manifest(found: Mapping[str, Any]) -> BlockMap:
    """Check every field of a bundle's manifest; raises InputError, naming the field, for the first that is wrong."""
    fields(found, "manifest", _KEYS)
    one_of(FORMAT)(found["format"], "format")
    if found["version"] != VERSION or type(found["version"]) is not int:
        raise InputError(f"version: {found['version']!r:.40} is not {VERSION}, which this tlfast reads; use another")
    word(found["tlfast"], "tlfast")
    word(found["transformers"], "transformers")
    one_of(DTYPE)(found["dtype"], "dtype")
    _check_model(fields(found["model"], "model", _MODEL))
    blocks = check_blocks(found["blocks"])
    if count_of(found["model"]) != len(blocks.kept):
        raise InputError(
            f"blocks: they are {len(blocks.kept)}, and the configuration has {count_of(found['model'])!r:.40}; refused"
        )
    _check_emulator(fields(found["emulator"], "emulator", ("recipe", "distilled")))
    _check_encodings(found["encodings"])
    _check_files(found)
    hexadecimal(32)(found["nonce"], "nonce")
    hexadecimal(64)(found["seal"], "seal")
    return blocks


def check_blocks(value: Any) -> BlockMap:
    """The block map of a manifest; InputError where it is none."""
    fields(value, "blocks", ("total", "adapter", "middle"))
    total = whole(1, MOST_BLOCKS)(value["total"], "blocks.total")
    adapter = listed(whole(0, total), 2)(value["adapter"], "blocks.adapter")
    middle = listed(whole(0, total - 1), MOST_BLOCKS)(value["middle"], "blocks.middle")
    if len(adapter) != 2 or sum(adapter) == 0 or sum(adapter) >= total:
        raise refuse("blocks.adapter", adapter, f"two sizes that leave a middle of {total} blocks")
    if not middle or middle != sorted(set(middle)) or middle[0] < adapter[0] or middle[-1] >= total - adapter[1]:
        raise refuse("blocks.middle", middle, "ascending indices of blocks between the adapter's two parts")
    return BlockMap(total, (adapter[0], adapter[1]), tuple(middle))


def check_file(value: Any, place: str) -> None:
    """What a manifest says of one file."""
    fields(value, place, ("bytes", "sha256"))
    whole(1, _MOST_BYTES)(value["bytes"], f"{place}.bytes")
    hexadecimal(64)(value["sha256"], f"{place}.sha256")


def _check_model(model: Mapping[str, Any]) -> None:
    word(model["class"], "model.class")
    word(model["type"], "model.type")
    one_of("sdpa", "eager")(model["attention"], "model.attention")
    whole(0, MOST_LABELS)(model["labels"], "model.labels")
    check_settings(model["type"], model["config"])


def _check_emulator(emulator: Mapping[str, Any]) -> None:
    word(emulator["recipe"], "emulator.recipe")
    distilled = emulator["distilled"]
    if distilled is not None:
        for name, value in fields(distilled, "emulator.distilled", _DISTILLED).items():
            number(value, f"emulator.distilled.{name}")


def _check_encodings(value: Any) -> None:
    if not isinstance(value, dict):
        raise refuse("encodings", value, "an object")
    for name, encoding in value.items():
        fields(encoding, f"encodings.{name[:60]}", ("kind", "rank"))
        one_of(*KINDS)(encoding["kind"], f"encodings.{name[:60]}.kind")
        whole(0, 1 << 24)(encoding["rank"], f"encodings.{name[:60]}.rank")


def _check_files(found: Mapping[str, Any]) -> None:
    names = [WEIGHTS]
    if found["preprocessor"] is not None:
        described = preprocessor.check(found["preprocessor"], "preprocessor")
        names += [TOKENIZER] if described["kind"] == "tokenizer" else []
    for name, file in fields(found["files"], "files", names).items():
        check_file(file, f"files.{name}")
