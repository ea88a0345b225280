"""The full model that a command of tlfast offsite is given, and the data to distil its emulator on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import LengthBuckets
from ..data.errors import InputError
from .backbone import LoadedBackbone, find_backbone, load_backbone
from .ladder_options import settings_of_the_user

if TYPE_CHECKING:
    from ..offsite import Distillation

_BATCH, _LENGTH, _AUDITED = 32, 128, 16


def load_owner(name: str) -> LoadedBackbone:
    """The model to make a bundle of, and its preprocessor: a language model with its head, an encoder without one."""
    from transformers import AutoConfig

    source = find_backbone(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {name!r}: its configuration cannot be read ({' '.join(str(error).split())})"
        ) from error
    return load_backbone(name, _class_of(config), _preprocessor_class(config.model_type))


def load_named(name: str, described: Mapping[str, Any]) -> LoadedBackbone:
    """The model in the class that a bundle was made with, and its preprocessor.

    described: of a manifest, which nobody has vouched for yet. Raises InputError where it names no class of a model.
    """
    from ..offsite.architecture import model_class

    model_class(described["class"], described["type"])
    return load_backbone(name, described["class"], _preprocessor_class(described["type"]))


def read_secret(path: Path | None) -> bytes:
    """The owner's secret; empty for none."""
    if path is None:
        return b""
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise InputError(f"--secret {path}: cannot be read ({error.strerror}); check the path") from error
    if len(secret) < 16:
        raise InputError(f"--secret {path}: has {len(secret)} bytes; write at least 16 random ones into it")
    return secret


def distillation_of(
    loaded: LoadedBackbone, path: Path | None, steps: int | None, rate: float | None, seed: int
) -> Distillation | None:
    """The distillation that the options describe; None without --distill."""
    return _own_training(
        loaded, path, seed, "--distill", {"steps": ("--steps", steps), "learning_rate": ("--distill-lr", rate)}
    )


def alignment_of(
    loaded: LoadedBackbone, path: Path | None, steps: int | None, rate: float | None, bundle: Path | None
) -> Distillation | None:
    """The alignment that the options of plug and eval describe; None without --align."""
    if path is not None and bundle is None:
        raise InputError("--align: needs the emulator that was tuned; pass --bundle")
    return _own_training(
        loaded, path, 0, "--align", {"steps": ("--align-steps", steps), "learning_rate": ("--align-lr", rate)}
    )


def _own_training(
    loaded: LoadedBackbone, path: Path | None, seed: int, option: str, settings: Mapping[str, tuple[str, Any]]
) -> Distillation | None:
    """Training on the owner's own inputs. settings: of Distillation, each with its option and what it was given."""
    from ..offsite import Distillation

    given: dict[str, Any] = {name: value for name, (_, value) in settings.items() if value is not None}
    if path is None:
        if given:
            useless = settings[next(iter(given))][0]
            raise InputError(f"{useless}: means nothing without {option}; add it or leave {useless} out")
        return None
    batches = _batches(loaded, path, seed)
    with settings_of_the_user():
        return Distillation(batches, seed=seed, **given)


def plain_batches(loaded: LoadedBackbone, path: Path) -> list[dict[str, Any]]:
    """The first batches of a file of texts or a folder of images, in a fixed order."""
    batches = _batches(loaded, path, 0)
    return [batches[i] for i in range(min(len(batches), _AUDITED))]


def _batches(loaded: LoadedBackbone, path: Path, seed: int) -> Batches:
    return _image_batches(loaded, path, seed) if loaded.max_length == 0 else _text_batches(loaded, path, seed)


def _class_of(config: Any) -> str:
    from ..backbone.families import DECODER, FAMILIES

    family = next((family for family in FAMILIES if config.model_type in family.model_types), None)
    if config.model_type == "t5":
        return "T5EncoderModel"
    return "AutoModelForCausalLM" if family is not None and set(family.stacks) == {DECODER} else "AutoModel"


def _preprocessor_class(model_type: str) -> str:
    from transformers import CONFIG_MAPPING

    return "AutoImageProcessor" if hasattr(CONFIG_MAPPING[model_type](), "image_size") else "AutoTokenizer"


class Batches:
    """Batches of a dataset, of items of similar length in an order drawn by the seed, made when they are asked for."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], seed: int) -> None:
        self.dataset, self.collate = dataset, collate
        self.order = list(LengthBuckets(dataset.lengths, _BATCH, seed))

    def __len__(self) -> int:
        return -(-len(self.order) // _BATCH)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows = self.order[index * _BATCH : (index + 1) * _BATCH]
        batch = self.collate([self.dataset[i] for i in rows])
        return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _text_batches(loaded: LoadedBackbone, path: Path, seed: int) -> Batches:
    """Texts, or blocks of running text for a language model."""
    from ..data import Examples, PadBatch, TokenDataset, cut_blocks, read_documents

    documents, length = read_documents(path), min(_LENGTH, loaded.max_length)
    if loaded.model.can_generate():  # type: ignore[operator]
        blocks = cut_blocks(documents, loaded.tokenizer, length)
        return Batches(blocks, PadBatch.of_decoder(loaded.tokenizer, length, "right"), seed)
    lines = list(range(1, len(documents) + 1))
    texts = TokenDataset.tokenise(Examples(path, documents.texts, None, None, lines), loaded.tokenizer, length)
    with settings_of_the_user():
        return Batches(texts, PadBatch.of(loaded.tokenizer, length), seed)


def _image_batches(loaded: LoadedBackbone, path: Path, seed: int) -> Batches:
    from ..data import ImageDataset, read_images, stack_batch

    return Batches(ImageDataset(read_images(path).files, loaded.tokenizer), stack_batch, seed)
