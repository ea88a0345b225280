"""The tokenizer or image processor of a bundle: data for code that everyone has, never code or a pickle."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from ..data.errors import InputError
from .schema import fields, listed, one_of, refuse, setting, whole, word

TOKENIZER = "tokenizer.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LONGEST = 1 << 24
# of ViT, DeiT, CLIP, SigLIP and (Bit's) DINOv2; the code of others is never reached
_IMAGE_CLASS = re.compile(r"(ViT|DeiT|CLIP|Siglip|Bit)ImageProcessor(Fast|Pil)?")
_IMAGES = "the image processors of ViT, DeiT, CLIP, SigLIP and Bit (DINOv2)"
_WIDEST = 4096  # pixels, and above every other number that an image processor is set to


def describe(preprocessor: Any) -> tuple[dict[str, Any], bytes | None]:
    """What the manifest says of a preprocessor, and the content of tokenizer.json where it is a tokenizer.

    Raises TypeError for what is neither a fast tokenizer nor one of the image processors of the vision models here,
    ValueError where a setting cannot be sent.
    """
    backend = getattr(preprocessor, "backend_tokenizer", None)
    if backend is None:
        return _describe_images(preprocessor), None
    plain = copy.deepcopy(backend)
    plain.no_truncation()
    plain.no_padding()
    described = {
        "kind": "tokenizer",
        "tokens": {name: _text(getattr(preprocessor, name)) for name in _TOKENS},
        "model_max_length": min(int(preprocessor.model_max_length), _LONGEST),
        "padding_side": preprocessor.padding_side,
        "truncation_side": preprocessor.truncation_side,
        "inputs": list(preprocessor.model_input_names),
    }
    return described, plain.to_str().encode("utf-8")


def check(value: Any, place: str) -> dict[str, Any]:
    """Raise InputError for anything but a description of a preprocessor."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "image processor":
        fields(value, place, ("kind", "class", "settings"))
        if not isinstance(value["class"], str) or not _IMAGE_CLASS.fullmatch(value["class"]):
            raise refuse(f"{place}.class", value["class"], _IMAGES)
        if not isinstance(value["settings"], dict):
            raise refuse(f"{place}.settings", value["settings"], "an object")
        setting(value["settings"], f"{place}.settings")
        if _largest(value["settings"]) > _WIDEST:  # images are resized to what it says
            raise refuse(f"{place}.settings", value["settings"], f"numbers of at most {_WIDEST}")
        return value
    if kind != "tokenizer":
        raise refuse(place, value, "a tokenizer or an image processor")
    fields(value, place, ("kind", "tokens", "model_max_length", "padding_side", "truncation_side", "inputs"))
    fields(value["tokens"], f"{place}.tokens", _TOKENS)
    for name, token in value["tokens"].items():
        if token is not None and not (isinstance(token, str) and 0 < len(token) <= 256):
            raise refuse(f"{place}.tokens.{name}", token, "null, or a text of at most 256 characters")
    whole(1, _LONGEST)(value["model_max_length"], f"{place}.model_max_length")
    for name in ("padding_side", "truncation_side"):
        one_of("left", "right")(value[name], f"{place}.{name}")
    listed(word, 8)(value["inputs"], f"{place}.inputs")
    return value


def load(described: Mapping[str, Any], content: bytes | None) -> Any:
    """The preprocessor of a description that was checked; InputError where the libraries here cannot make it."""
    if described["kind"] == "image processor":
        return _load_images(described)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    assert content is not None
    try:
        backend = Tokenizer.from_buffer(content)
        tokens = {name: token for name, token in described["tokens"].items() if token is not None}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            model_max_length=described["model_max_length"],
            padding_side=described["padding_side"],
            truncation_side=described["truncation_side"],
            model_input_names=described["inputs"],
            **tokens,
        )
    except BaseException as error:  # tokenizers raises plain Exceptions, and where its code panics a BaseException
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{TOKENIZER}: no tokenizer can be made of it ({reason}); it is refused") from error


def _describe_images(processor: Any) -> dict[str, Any]:
    kind = type(processor)
    if not kind.__module__.startswith("transformers.models.") or not _IMAGE_CLASS.fullmatch(kind.__name__):
        raise TypeError(
            f"preprocessor: got a {kind.__name__}; pass a fast tokenizer, or one of {_IMAGES} in transformers"
        )
    given = json.loads(processor.to_json_string())
    settings = {name: value for name, value in given.items() if name in _image_settings(kind)}
    try:
        return check({"kind": "image processor", "class": kind.__name__, "settings": settings}, "preprocessor")
    except InputError as error:
        raise ValueError(f"preprocessor: a setting cannot be sent ({error})") from error


def _load_images(described: Mapping[str, Any]) -> Any:
    import transformers

    try:
        kind = getattr(transformers, described["class"], None)
        if not inspect.isclass(kind) or not kind.__module__.startswith("transformers.models."):
            raise refuse("preprocessor.class", described["class"], f"{_IMAGES}, as the transformers here has them")
        known = _image_settings(kind)
    except (ImportError, RuntimeError, OSError) as error:  # transformers wraps what a module of its own raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"preprocessor: {described['class']} needs a package that is not here ({reason}); install it"
        ) from error
    unknown = sorted(described["settings"].keys() - known)
    if unknown:
        raise InputError(f"preprocessor: {unknown[0]!r} is no setting of a {kind.__name__}; it is refused")
    try:
        return kind(**described["settings"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"preprocessor: no {kind.__name__} can be made of its settings ({error})") from error


def _image_settings(kind: Any) -> set[str]:
    """The settings an image processor has by default, without the name of its class."""
    names = kind().to_dict().keys()
    return {name for name in names if not name.startswith("_") and not name.endswith("processor_type")}


def _largest(value: Any) -> float:
    """The largest number in a setting."""
    if isinstance(value, list | dict):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int | float) else 0


def _text(token: Any) -> str | None:
    return None if token is None else str(token)
