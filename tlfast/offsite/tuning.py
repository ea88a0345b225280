"""The data owner's side: from a bundle and data to an adapter, by the trainer that ladders are trained with."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbone import most_tokens
from ..data import InputError
from ..ladder import LadderModel
from ..training import Fit, Settings, Task, TaskData, calibration_batches, fit
from .adapter import Adapter
from .align import align, check_alignment
from .block_map import BlockMap
from .bundle import Bundle
from .choices import Chooser
from .comparison import EMULATOR, PLUGGED, ZERO
from .distil import Distillation
from .methods import Method, TaskSpec, load_trained, trained, tunable
from .plugging import plug, tuned_emulator
from .reading import layout_of
from .tasks import CHOICE


def spec_of(task: Task, preprocessor: Any) -> TaskSpec:
    """What the full model will need to know of a fitted task."""
    labels = getattr(task, "labels", None)
    names = getattr(labels, "names", None)
    regression = task.num_labels == 1 and task.problem_type == "regression"
    pad = getattr(preprocessor, "pad_token_id", None)
    known = None if names is None or regression or len(names) != task.num_labels else tuple(map(str, names))
    return TaskSpec(task.name, task.num_labels, task.problem_type, known, pad)


def prepare_tokenizer(bundle: Bundle) -> Any:
    """The bundle's preprocessor; a tokenizer that cannot pad pads with its end of text, which is masked anyway.

    Raises InputError where the bundle has none.
    """
    preprocessor = bundle.preprocessor
    if preprocessor is None:
        raise InputError("the bundle has no tokenizer or image processor; ask its owner for one that has")
    if bundle.manifest["preprocessor"]["kind"] == "tokenizer" and preprocessor.pad_token is None:
        if preprocessor.eos_token is None:
            raise InputError("the bundle's tokenizer has neither a padding token nor an end of text; ask for another")
        preprocessor.pad_token = preprocessor.eos_token
    return preprocessor


def longest_input(bundle: Bundle, preprocessor: Any) -> int:
    """The most tokens a text may have; 0 for a model of images."""
    if bundle.manifest["preprocessor"]["kind"] != "tokenizer":
        return 0
    return most_tokens(bundle.model.config, preprocessor)


def tune(
    bundle: Bundle,
    task: Task,
    data: TaskData,
    spec: TaskSpec,
    method: Method,
    settings: Settings,
    checkpoints: Path,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Tune on a bundle; dev selects the epoch and the learning rate. The bundle is all that is needed of the model.

    Raises InputError where task, method and model do not fit, and as `training.fit` does.
    """

    make = functools.partial(tunable, bundle.model, bundle.blocks, spec, method, settings.seed)

    def make_model() -> nn.Module:
        model = make()
        if isinstance(model, LadderModel) and not bool(model.calibrated):
            model.calibrate(calibration_batches(data, settings.seed))
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    try:
        make()  # before any step: a task or a method that does not fit
    except ValueError as error:
        raise InputError(str(error)) from error
    return fit(make_model, data, settings, checkpoints, resume, progress, report)


def stages(
    full: nn.Module,
    bundle: Bundle,
    adapter: Adapter,
    secret: bytes = b"",
    alignment: Distillation | None = None,
    progress: Callable[[float], Any] = lambda loss: None,
) -> dict[str, nn.Module]:
    """Zero-shot, tuned emulator and plug-in, as `compare` takes them.

    Zero-shot is the full model as it is; for a classification, with the head that came back, on blocks nobody tuned. A
    ladder has no such stage. alignment: as in `plug`; the plug-in is then the aligned one.
    Raises InputError where adapter, bundle and model do not belong together, ValueError as `plug` does.
    """
    if adapter.bundle_sha256 != bundle.sha256:
        raise InputError(f"{adapter.folder}: was trained on another bundle; pass the one it was trained on")
    plugged = plug(full, adapter.folder, secret=secret)
    if alignment is not None:
        check_alignment(adapter)
        align(plugged, tuned_emulator(bundle, adapter), adapter.blocks, alignment, progress)
    if adapter.task.name == CHOICE:
        plugged = Chooser(plugged)
    emulator = tunable(bundle.model, bundle.blocks, adapter.task, adapter.method)
    tensors = adapter.tensors(layout_of(trained(emulator)))
    load_trained(emulator, tensors)
    found: dict[str, nn.Module] = {}
    if adapter.method.name != "ladder":
        untuned = tunable(full, adapter.blocks, adapter.task, Method())
        heads = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
        load_trained(untuned, trained(untuned) | heads)
        found[ZERO] = untuned.eval()
    return found | {EMULATOR: emulator.eval(), PLUGGED: plugged}


def tune_full(
    full: nn.Module, bundle: Bundle, adapter: Adapter, task: Task, data: TaskData, settings: Settings
) -> nn.Module:
    """The same method on the same blocks, inside the full model."""
    blocks = adapter.blocks
    middle = range(blocks.adapter[0], blocks.total - blocks.adapter[1])
    whole = replace(bundle, model=full, blocks=BlockMap(blocks.total, blocks.adapter, tuple(middle)))
    with tempfile.TemporaryDirectory() as folder:
        return tune(whole, task, data, adapter.task, adapter.method, settings, Path(folder)).model.eval()
