"""One class a task, with a common protocol: read, dataset, collate, scoring, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from ...data import InputError
from ..trainer import TaskData
from .base import TASK, Predictions, Task
from .choices import ChoiceTask
from .images import ImageTask
from .language import CausalTask, Seq2SeqTask
from .tags import TagTask
from .text import Columns, TextTask

T = TypeVar("T", bound=Task)

TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (TextTask, TagTask, ImageTask, CausalTask, Seq2SeqTask)}

__all__ = ["TASKS", "ChoiceTask", "Columns", "Predictions", "Task", "TextTask", "load_data", "load_task"]


def load_data(
    task: T, train_file: str | Path, dev_file: str | Path | None, preprocessor: Any, seed: int
) -> tuple[T, TaskData]:
    """The fitted task, and its training and dev data; without a dev file a seeded tenth of the training data is dev.

    Raises InputError for anything wrong with the files.
    """
    train = task.read(train_file, labelled=True)
    task = task.fitted(train)
    dev = None if dev_file is None else task.read(dev_file, labelled=True)
    parts = task.datasets(train, dev, preprocessor, seed)
    return task, TaskData(*parts, task.collate(preprocessor), task.scoring(preprocessor))


def load_task(folder: Path) -> Task:
    """Read task.json; InputError where the folder holds no trained model or the file is damaged."""
    path = folder / TASK
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; pass the --out of a training run")
    if not path.is_file():
        raise InputError(f"{folder}: holds no trained model ({TASK} is missing); pass the --out of a finished run")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return TASKS[saved.get("task", TextTask.name)].from_saved(saved)  # the first versions had one task
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: the file is damaged; train again") from None
