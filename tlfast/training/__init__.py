"""What the commands share around transformers.Trainer: tasks, fitting, selection by dev, resuming, a run's folder."""

from .cached import CacheReport, TapReader, on_cache
from .evaluation import evaluate, evaluate_test, predict_logits
from .folder import RunFolder, write_whole
from .results import batch_shape, calibration_batches, file_digest, results, typical_batch, write_results
from .tasks import TASKS, ChoiceTask, Columns, Task, TextTask, load_data, load_task
from .trainer import Fit, InterruptedTraining, Settings, TaskData, Trial, fit

__all__ = [
    "TASKS",
    "CacheReport",
    "ChoiceTask",
    "Columns",
    "Fit",
    "InterruptedTraining",
    "RunFolder",
    "Settings",
    "TapReader",
    "Task",
    "TaskData",
    "TextTask",
    "Trial",
    "batch_shape",
    "calibration_batches",
    "evaluate",
    "evaluate_test",
    "file_digest",
    "fit",
    "load_data",
    "load_task",
    "on_cache",
    "predict_logits",
    "results",
    "typical_batch",
    "write_results",
    "write_whole",
]
