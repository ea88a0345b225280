"""The owner's last step: an adapter plugged into the full model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..data.errors import InputError
from ..ladder import LadderModel
from .adapter import WEIGHTS, Adapter
from .align import align, check_alignment
from .architecture import find_blocks
from .bundle import Bundle
from .choices import writes
from .distil import Distillation
from .folder import check_new, new_folder
from .making import check_model
from .methods import Adapted, TaskSpec, load_trained, trained, tunable
from .reading import layout_of
from .seal import is_sealed, seal_key


def plug(
    model: nn.Module,
    adapter: str | Path,
    out: str | Path | None = None,
    bundle: str | Path | None = None,
    secret: bytes = b"",
    preprocessor: Any = None,
    alignment: Distillation | None = None,
    progress: Callable[[float], Any] = lambda loss: None,
) -> nn.Module:
    """Put a data owner's adapter into the full model; nothing is written before everything was checked.

    model: the full model that the bundle was made of; it is left as it is. adapter: the folder that came back, which is
        not trusted: bundle, keys, shapes, dtypes, finiteness and size are compared with what this model and the sealed
        bundle ask for. out: a new folder, for the plugged model and its preprocessor as save_pretrained writes them.
    bundle: the bundle that the adapter must be of; None takes any that was made of this model. secret: as in `make`.
    alignment: inputs of the owner's, on which the last blocks are trained to give what the tuned emulator's give; needs
        `bundle`, and is not for a ladder. progress is called with the loss of each of its steps.
    Returns the plugged model, in eval mode: transformers' class for the task, or a LadderModel where a ladder was
    trained. Raises InputError, with the reason, for an adapter that is refused.
    """
    if alignment is not None and bundle is None:
        raise ValueError("alignment: needs the emulator that was tuned; pass bundle")
    check_model(model)
    if out is not None:
        check_new(Path(out))
    opened = Adapter.open(adapter)
    _check_origin(model, opened, bundle, secret)
    _check_claims(model, opened)
    if alignment is not None:
        check_alignment(opened)
    try:
        tuned = tunable(model, opened.blocks, opened.task, opened.method)
    except ValueError as error:
        raise InputError(f"{adapter}: does not fit the model: {error}") from error
    load_trained(tuned, opened.tensors(layout_of(trained(tuned))))
    plugged = _finished(tuned, opened.task)
    if alignment is not None and bundle is not None:
        align(plugged, tuned_emulator(Bundle.read(bundle), opened), opened.blocks, alignment, progress)
    if out is not None:
        with new_folder(Path(out)) as folder:
            plugged.save_pretrained(folder)
            if preprocessor is not None:
                preprocessor.save_pretrained(folder)
    return plugged


def tuned_emulator(bundle: Bundle, adapter: Adapter) -> nn.Module:
    """The emulator as its data owner had it in the end, in eval mode: a transformers model, or a LadderModel."""
    emulator = tunable(bundle.model, bundle.blocks, adapter.task, adapter.method)
    load_trained(emulator, adapter.tensors(layout_of(trained(emulator))))
    return _finished(emulator, adapter.task)


def _check_origin(model: Any, adapter: Adapter, bundle: str | Path | None, secret: bytes) -> None:
    """That the bundle was made of this model, by its owner, and is the one that is meant."""
    if not is_sealed(adapter.bundle, seal_key(model, secret)):
        raise InputError(
            f"{adapter.folder}: its bundle was not made of this model, or with another secret, or was changed; plug it "
            "into the model its bundle came from"
        )
    if len(find_blocks(model).blocks) != adapter.blocks.total:
        raise InputError(
            f"{adapter.folder}: its bundle is of a model with {adapter.blocks.total} blocks; it is refused"
        )
    if bundle is not None:
        expected = Bundle.read(bundle).sha256
        if adapter.bundle_sha256 != expected:
            raise InputError(
                f"{adapter.folder}: was trained on another bundle ({adapter.bundle_sha256[:12]}) than {bundle} "
                f"({expected[:12]}); ask for the adapter of this one"
            )


def _check_claims(model: Any, adapter: Adapter) -> None:
    """Before memory is taken for what the manifest claims: that its file can hold a row for each label and rank.

    A row is as wide as the blocks, in float32; a quarter of that is asked for, since some models project first.
    """
    rows = max(adapter.task.labels or 0, adapter.method.rank if adapter.method.name == "lora" else 0)
    listed = adapter.manifest["files"][WEIGHTS]["bytes"]
    if rows * find_blocks(model).spec.width > listed:
        raise InputError(f"{adapter.folder}: claims {rows} rows, for which {listed} bytes are too few; it is refused")


def _finished(tuned: nn.Module, task: TaskSpec) -> Any:
    if isinstance(tuned, LadderModel):
        return tuned.eval()
    assert isinstance(tuned, Adapted)
    plugged = tuned.merged()
    if task.label_names is not None:
        plugged.config.id2label = dict(enumerate(task.label_names))
        plugged.config.label2id = {name: i for i, name in enumerate(task.label_names)}
    if writes(plugged):  # training kept no keys and values; writing text does
        plugged.config.use_cache = True
    return plugged.requires_grad_(True).eval()
