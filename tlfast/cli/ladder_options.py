"""What the options of tlfast ladder mean, and what is refused."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.errors import InputError

if TYPE_CHECKING:
    from ..ladder import LadderConfig
    from ..training import Task


def task_kind(task: str) -> type[Task]:
    """The class of --task."""
    from ..training import TASKS

    return choose_task(task, TASKS)


def choose_task(task: str, kinds: Mapping[str, type[Task]]) -> type[Task]:
    """The class of --task among those that a command has."""
    if task not in kinds:
        raise InputError(f"--task {task!r}: is not available; choose one of {', '.join(kinds)}")
    return kinds[task]


def own_options(method: Callable[..., Any], task: str, **given: Any) -> dict[str, Any]:
    """The options that were given (None: not), which must be among the method's parameters."""
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in inspect.signature(method).parameters:
            raise InputError(f"--{name.replace('_', '-')}: means nothing for {task}; leave it out")
    return chosen


def check_test(path: Path, kind: type[Task]) -> None:
    """The test data are read after training, but whether they are there is known before."""
    if not (path.is_dir() if kind.reads_folders else path.is_file()):
        raise InputError(f"{path}: there is no such {'folder' if kind.reads_folders else 'file'}; check the path")


def learning_rates(text: str) -> tuple[float, ...]:
    """The rates of --lr."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--lr {text!r}: pass a number, or several separated by commas, such as 1e-3,5e-4") from None
    if not all(0 < rate < math.inf for rate in rates):
        raise InputError(f"--lr {text!r}: a learning rate must be a finite number above 0")
    if len(set(rates)) < len(rates):
        raise InputError(f"--lr {text!r}: a learning rate is there twice; pass each once")
    return rates


def ladder_config(
    reduction: int,
    layers: str,
    decoder_layers: str | None,
    init: str,
    dropout: float | None,
    tap_storage: str = "keep",
    tap_dim: int | None = None,
    side_precision: str = "fp32",
) -> LadderConfig:
    """The ladder that the options describe."""
    import torch

    from ..ladder import LadderConfig

    if tap_dim is not None and tap_storage != "project":
        raise InputError(f"--tap-dim {tap_dim}: means nothing for --tap-storage {tap_storage}; leave it out")
    if tap_storage == "offload" and not torch.cuda.is_available():
        raise InputError(
            "--tap-storage offload: brings states from a GPU to the host, and there is no GPU; use int8 or stream"
        )
    others: dict[str, Any] = {"tap_storage": tap_storage, "side_precision": side_precision}
    if tap_dim is not None:
        others["tap_dim"] = tap_dim
    blocks = _blocks("--layers", layers)
    decoder = None if decoder_layers is None else _blocks("--decoder-layers", decoder_layers)
    with settings_of_the_user():
        return LadderConfig(
            reduction=reduction, layers=blocks, decoder_layers=decoder, init=init, dropout=dropout, **others
        )


def _blocks(option: str, text: str) -> str | list[int]:
    try:
        return text if text == "all" else [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'{option} {text!r}: pass "all" or block indices separated by commas, such as 1,3,5') from None


@contextmanager
def settings_of_the_user() -> Iterator[None]:
    """Around calls of the library that check what the user passed and refuse it with a ValueError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
