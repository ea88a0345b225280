"""What training will take, before anything is trained: from a model's configuration alone."""

from .ladders import ladder_rows
from .outline import TASKS, Job, Outline, default_task, outline
from .peers import peer_rows
from .row import Row
from .terms import STORAGES

__all__ = ["STORAGES", "TASKS", "Job", "Outline", "Row", "default_task", "ladder_rows", "outline", "peer_rows"]
