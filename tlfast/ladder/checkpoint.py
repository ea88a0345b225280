"""A saved ladder: a folder with model.safetensors, config.json and the backbone's fingerprint. Never pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..backbone import FrozenBackbone, freeze, is_prepared
from ..backbone.trained_folder import CONFIG, load_trained, write_trained
from .config import LadderConfig

if TYPE_CHECKING:
    from .model import LadderModel

FORMAT = 2
_BACKBONE_KEYS = {"name", "model_type", "precision", "fingerprint", "lm_head", "blocks"}
_LOADERS = {"causal-lm": "AutoModelForCausalLM", "seq2seq-lm": "AutoModelForSeq2SeqLM"}


def save(model: LadderModel, folder: Path) -> None:
    """Write both files under temporary names and rename them, so that a failure leaves no half-written ladder."""
    backbone = model.backbone
    description = {
        "format": FORMAT,
        "task": model.task,
        "num_labels": model.num_labels,
        "problem_type": model.problem_type,
        "ladder": model.ladder_config.to_dict() | _layers(backbone),
        "backbone": {
            "name": backbone.name,
            "model_type": backbone.model_type,
            "precision": backbone.precision,
            "fingerprint": backbone.fingerprint(),
            "lm_head": _head_fingerprint(model),
            "blocks": None if backbone.stack.parts is not None else backbone.stack.path,
        },
    }
    write_trained(folder, model, description)


def _layers(backbone: FrozenBackbone) -> dict[str, Any]:
    """The kept blocks, as LadderConfig takes them."""
    if not backbone.is_encoder_decoder:
        return {"layers": list(backbone.tap_indices)}
    return {"layers": list(backbone.stacks["encoder"].taps), "decoder_layers": list(backbone.tap_indices)}


def _head_fingerprint(model: LadderModel) -> str | None:
    """What identifies the frozen language-model head that the ladder writes through; None for a classifier."""
    lm_head = None if model.num_labels is not None else model.backbone.lm_head
    return None if lm_head is None else lm_head.fingerprint()


def load(cls: type[LadderModel], folder: Path, backbone: FrozenBackbone | nn.Module | str | Path) -> LadderModel:
    """Rebuild a saved ladder on its backbone, after checking that it is the same backbone."""
    description = read_config(folder)
    frozen = _frozen(backbone, description)
    _check_same(folder, frozen, description["backbone"])
    model = cls(
        frozen,
        task=description["task"],
        num_labels=description["num_labels"],
        config=LadderConfig(**description["ladder"]),
        problem_type=description["problem_type"],
    )
    _check_head(folder, model, description["backbone"])
    load_trained(folder, model, "ladder")
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The description of a saved ladder; ValueError if the folder holds none or it is of another format."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: holds no saved ladder ({CONFIG} is missing); pass a folder written by tlfast")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); the file is damaged, save the ladder again") from error
    keys = {"format", "task", "num_labels", "problem_type", "ladder", "backbone"}
    if not isinstance(description, dict) or not keys <= description.keys():
        raise ValueError(f"{path}: does not describe a ladder; pass a folder written by tlfast")
    if description["format"] != FORMAT:
        raise ValueError(f"{path}: format {description['format']!r}, this version reads {FORMAT}; upgrade tlfast")
    _check_parts(path, description)
    return description


def _check_parts(path: Path, description: dict[str, Any]) -> None:
    """ValueError where a part is not what `save` writes."""
    settings, backbone = description["ladder"], description["backbone"]
    if not isinstance(settings, dict) or not isinstance(backbone, dict) or _BACKBONE_KEYS - backbone.keys():
        raise ValueError(f"{path}: does not describe a ladder; pass a folder written by tlfast")
    unknown = settings.keys() - {field.name for field in dataclasses.fields(LadderConfig)}
    if unknown:
        raise ValueError(f"{path}: unknown ladder settings {sorted(unknown)}; upgrade tlfast")
    try:
        LadderConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; the file is damaged, save the ladder again") from error


def _frozen(backbone: FrozenBackbone | nn.Module | str | Path, description: dict[str, Any]) -> FrozenBackbone:
    if isinstance(backbone, FrozenBackbone):
        stacks = backbone.stacks
        encoder = range(len(stacks["encoder"].blocks)) if backbone.is_encoder_decoder else None
        return backbone.with_taps(range(len(backbone.blocks)), encoder)
    model: Any = backbone
    if isinstance(backbone, str | Path) and is_prepared(backbone):
        return FrozenBackbone.from_pretrained(backbone)
    if isinstance(backbone, str | Path):
        import transformers

        loader = getattr(transformers, _LOADERS.get(description["task"], "AutoModel"))
        try:
            model = loader.from_pretrained(str(backbone)).float()
        except OSError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"backbone: {str(backbone)!r} cannot be loaded ({reason}); pass another") from error
    return freeze(model, precision=description["backbone"]["precision"], blocks=description["backbone"]["blocks"])


def _check_head(folder: Path, model: LadderModel, saved: dict[str, Any]) -> None:
    found = _head_fingerprint(model)
    if found == saved["lm_head"]:
        return
    of_found, of_saved = (str(head).partition(":")[0] for head in (found, saved["lm_head"]))
    raise ValueError(
        f"backbone: its language-model head ({of_found}) is not the one the ladder in {folder} was trained on "
        f"({of_saved}): its weights, bias, scale or cap differ; pass that model"
    )


def _check_same(folder: Path, backbone: FrozenBackbone, saved: dict[str, Any]) -> None:
    """The weights, and how they are stored: taps of another precision are not those the ladder learned from."""
    if backbone.fingerprint() != saved["fingerprint"]:
        given = backbone.name or f"this {backbone.model_type} model"
        raise ValueError(
            f"backbone: the weights of {given} are not those the ladder in {folder} was trained on "
            f"({saved['name'] or saved['model_type']}); pass that backbone"
        )
    if backbone.precision != saved["precision"]:
        raise ValueError(
            f"backbone: its precision is {backbone.precision}, and the ladder in {folder} was trained on "
            f"{saved['precision']}; pass freeze(model, precision={saved['precision']!r})"
        )
