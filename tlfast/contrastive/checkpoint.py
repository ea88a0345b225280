"""A saved dual encoder: a folder with model.safetensors, config.json and fingerprints of what is frozen. No pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..backbone import FrozenBackbone, is_prepared
from ..backbone.trained_folder import CONFIG, load_trained, write_trained
from .bodies import Body
from .towers import Plan, TowerConfig

if TYPE_CHECKING:
    from .dual import DualEncoder

FORMAT, KIND = 1, "dual-encoder"
_KEYS = {"format", "kind", "dim", "max_scale", "one_model", "image", "text"}
_TOWER_KEYS = {"settings", "model", "name", "architecture", "precision", "fingerprint"}


def describe(
    image: nn.Module, text: nn.Module, one_model: bool, plans: tuple[Plan, Plan], dim: int, max_scale: float
) -> dict[str, Any]:
    """What config.json says, but for the fingerprints, which cost a read of all weights."""
    towers = {
        plan.argument: {
            "settings": plan.config.to_dict(),
            "model": _kind(model),
            "name": getattr(getattr(model, "config", None), "_name_or_path", "") or "",
            "architecture": _architecture(model) if plan.config.train == "full" else None,
            "precision": plan.body.precision,
        }
        for plan, model in zip(plans, (image, text), strict=True)
    }
    return {"format": FORMAT, "kind": KIND, "dim": dim, "max_scale": max_scale, "one_model": one_model, **towers}


def save(model: DualEncoder, folder: Path) -> None:
    """Write both files under temporary names and rename them, so that a failure leaves no half-written model."""
    description = dict(model.description)
    for name in ("image", "text"):
        description[name] = description[name] | {"fingerprint": getattr(model, name).body.fingerprint()}
    write_trained(folder, model, description)


def load(
    cls: type[DualEncoder], folder: Path, image: nn.Module | str | None, text: nn.Module | str | None
) -> DualEncoder:
    """Rebuild a saved dual encoder, after checking that what is frozen is what it was trained on."""
    description = read_config(folder)
    image_model, text_model = _sources(description, image, text, folder)
    try:
        of_image, of_text = (TowerConfig.from_dict(description[name]["settings"]) for name in ("image", "text"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}; the file is damaged, save the model again") from error
    model = cls(
        image_model,
        text_model,
        of_image,
        of_text,
        dim=description["dim"],
        max_scale=description["max_scale"],
    )
    for name in ("image", "text"):
        _check_same(folder, name, getattr(model, name).body, description[name])
    load_trained(folder, model, "model")
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The description of a saved dual encoder; ValueError if the folder holds none or it is of another format."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: holds no saved dual encoder ({CONFIG} is missing); pass a folder it was saved to")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); the file is damaged, save the model again") from error
    if not isinstance(description, dict) or description.get("kind") != KIND or not description.keys() >= _KEYS:
        raise ValueError(f"{path}: does not describe a dual encoder; pass a folder that DualEncoder was saved to")
    if description["format"] != FORMAT:
        raise ValueError(f"{path}: format {description['format']!r}, this version reads {FORMAT}; upgrade tlfast")
    for name in ("image", "text"):
        if not _describes_tower(description[name]):
            raise ValueError(f"{path}: its {name} tower is not described; the file is damaged, save the model again")
    for name, kinds in (("dim", int), ("max_scale", (int, float)), ("one_model", bool)):
        value = description[name]
        if not isinstance(value, kinds) or (kinds is not bool and (isinstance(value, bool) or not value > 0)):
            raise ValueError(f"{path}: {name} is {value!r}; the file is damaged, save the model again")
    return description


def _describes_tower(tower: Any) -> bool:
    if not isinstance(tower, dict) or _TOWER_KEYS - tower.keys() or not isinstance(tower["settings"], dict):
        return False
    ladder, built = tower["settings"].get("ladder"), tower["architecture"]
    if not isinstance(ladder, dict | None):
        return False
    return built is None or (isinstance(built, dict) and isinstance(built.get("config"), dict) and "class" in built)


def _kind(model: nn.Module) -> str:
    inner: Any = model.model if isinstance(model, FrozenBackbone) else model
    return getattr(getattr(inner, "config", None), "model_type", None) or type(inner).__name__


def _architecture(model: Any) -> dict[str, Any] | None:
    """What rebuilds a transformers model without its weights; None for any other."""
    if not type(model).__module__.startswith("transformers."):
        return None
    return {"class": type(model).__name__, "config": json.loads(model.config.to_json_string(use_diff=False))}


def _sources(
    description: dict[str, Any], image: nn.Module | str | None, text: nn.Module | str | None, folder: Path
) -> tuple[nn.Module, nn.Module | None]:
    """The models of both towers; None for the second where the first has both."""
    of_image, of_text = description["image"], description["text"]
    if not description["one_model"] or text is not None:
        return _source("image", image, of_image, folder), _source("text", text, of_text, folder)
    if of_image["architecture"] is None or of_text["architecture"] is None:  # one tower of the model is frozen
        of_image = {**of_image, "architecture": None}
    return _source("image", image, of_image, folder), None


def _source(argument: str, given: nn.Module | str | None, saved: dict[str, Any], folder: Path) -> nn.Module:
    """The model that a tower is made of."""
    if isinstance(given, nn.Module):
        return given
    if given is None and saved["architecture"] is not None:
        return _rebuilt(saved["architecture"], folder)
    name = str(given) if given is not None else saved["name"]
    if not name:
        raise ValueError(
            f"{argument}: {folder} holds no {saved['model']} weights, and it was not loaded by a name; pass {argument}="
            "the model that it was made of"
        )
    if is_prepared(name):
        return FrozenBackbone.from_pretrained(name)
    import transformers

    try:
        return transformers.AutoModel.from_pretrained(name).float()
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{argument}: {name!r} cannot be loaded ({reason}); pass another {argument}=") from error


def _rebuilt(architecture: dict[str, Any], folder: Path) -> nn.Module:
    import transformers

    model_class = getattr(transformers, str(architecture["class"]), None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(
            f"{folder}: transformers has no model {architecture['class']!r}; upgrade it, or pass the model"
        )
    config_class: Any = model_class.config_class
    return model_class(config_class.from_dict(architecture["config"]))


def _check_same(folder: Path, argument: str, body: Body, saved: dict[str, Any]) -> None:
    """Embeddings of another frozen model, or of its weights in other bits, are not those the heads learned from."""
    if body.precision != saved["precision"]:
        raise ValueError(
            f"{argument}: its precision is {body.precision}, and the model in {folder} was trained on "
            f"{saved['precision']}; pass tlfast.freeze(model, precision={saved['precision']!r})"
        )
    if body.fingerprint() != saved["fingerprint"]:
        raise ValueError(
            f"{argument}: its frozen weights are not those that the model in {folder} was trained on "
            f"({saved['name'] or saved['model']}); pass {argument}= that model"
        )
